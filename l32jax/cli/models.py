"""The verb that lists presets. Its `--help` does not import jax."""

from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from l32jax.config import LlamaConfig
from l32jax.presets import PRESETS

BF16_BYTES = 2


class Size(NamedTuple):
    """Of one model. `cache_bytes` are those of one token's keys and values, in bfloat16."""

    parameters: int
    context: int
    cache_bytes: int
    tokens_per_image: int


def size(config: LlamaConfig) -> Size:
    """Counts shapes; allocates nothing."""
    import jax

    from l32jax.model.llama import abstract_params
    from l32jax.model.parameters import count
    from l32jax.sharding import single_device_mesh

    decoder, vision = config.decoder, config.vision
    with jax.set_mesh(single_device_mesh()):
        parameters = count(abstract_params(config))
    per_layer = 2 * decoder.num_kv_heads * decoder.head_dim * BF16_BYTES
    return Size(
        parameters,
        decoder.max_context,
        decoder.count("self") * per_layer,
        0 if vision is None else vision.max_tiles * vision.tokens_per_tile,
    )


def models() -> int:
    """Lists the models that can be made by name, and their sizes.

    Weights in bfloat16 take two bytes a parameter. The cache of a conversation takes its bytes
    for every token; an image is seen as up to that many tokens. As --model, a name stands for
    random parameters, which are good for trying things out.

    Examples:
      l32jax models
    """
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for title in ("parameters", "bfloat16", "context", "cache\nbytes", "image\ntokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, config in PRESETS.items():
        table.add_row(name, *_cells(size(config)))
    Console().print(table)
    return 0


def _cells(size: Size) -> tuple[str, ...]:
    image = f"{size.tokens_per_image:,}" if size.tokens_per_image else "-"
    weights = _bytes(size.parameters * BF16_BYTES)
    return f"{size.parameters:,}", weights, f"{size.context:,}", f"{size.cache_bytes:,}", image


def _bytes(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
