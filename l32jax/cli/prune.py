"""The verb that prunes."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from tyro.conf import arg

from l32jax.cli.counting import Bar
from l32jax.cli.stopping import stoppable
from l32jax.config import LlamaConfig, MeshConfig
from l32jax.errors import InputError
from l32jax.presets import PRESETS

if TYPE_CHECKING:
    from l32jax.compress.prune import Pruned
    from l32jax.generate.model import Model

REPORT = "pruning.json"


def prune(
    source: Annotated[str, arg(metavar="SRC")],
    destination: Annotated[str, arg(metavar="DST")],
    /,
    *,
    to: Literal["llama3.2-1b", "llama3.2-3b", "custom"],
    calibration: Annotated[str, arg(metavar="SOURCE")],
    held_out: Annotated[str | None, arg(metavar="SOURCE")] = None,
    rows: int = 128,
    length: int = 1024,
    layers: int | None = None,
    embed_dim: int | None = None,
    mlp_dim: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    mesh: str = "",
    dtype: Literal["float32", "bfloat16"] | None = None,
    tokenizer: Annotated[str | None, arg(metavar="PATH")] = None,
) -> int:
    """Makes a smaller model out of a larger one, to be distilled into.

    Leaves out layers, heads, neurons and channels that do least on the calibration set, lets the
    rest take over what they gave, and tells what each part cost in perplexity on text held out.
    The whole model is in the devices' memory, twice at times: 8B in bfloat16 takes 32 GB of it.
    DST appears when all of it is written; DST.pruning.json has what was kept.

    Examples:
      l32jax prune Llama-3.1-8B llama-1b --to llama3.2-1b --calibration 'web/*.parquet'
      l32jax prune Llama-3.1-8B llama-6b --to custom --layers 24 --calibration web.jsonl
      l32jax prune Llama-3.2-11B-Vision small --to custom --layers 30 --mlp-dim 8192 \\
        --calibration captions.tar --mesh fsdp=4,tensor=2
      l32jax prune SmolLM2-135M.gguf smol --to custom --layers 20 --calibration python-docs/train

    Args:
      source: a model in any format (see `l32jax convert`).
      destination: a path that does not exist yet; Orbax, unless it ends with .gguf or .safetensors.
      to: the sizes of a released model, or those given below.
      calibration: a source of samples, as in a config's mixture; about what the model is for.
      held_out: another one, to judge by; by default the last tenth of the calibration's records.
      rows: of packed text to calibrate on; a quarter as many are to judge by.
      length: tokens of a row.
      layers: of both kinds in a vision model, which loses whole groups of them.
      embed_dim: channels of the residual stream.
      mlp_dim: neurons of each MLP.
      heads: query heads of a layer.
      kv_heads: key/value heads of a layer.
      head_dim: dims of a head: a divisor of the model's.
      mesh: devices along the mesh axes, like fsdp=4,tensor=2; by default all along fsdp.
      dtype: of weights and computation; bfloat16 by default, on CPU float32.
      tokenizer: its file or folder, if it does not stand beside the weights.
    """
    sizes = {
        "embed_dim": embed_dim,
        "mlp_dim": mlp_dim,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    destination = destination.rstrip("/") or "/"
    _check(to, {"layers": layers} | sizes, destination, rows, length)
    from l32jax import api
    from l32jax.compress.batches import open_sets
    from l32jax.compress.report import table
    from l32jax.conversion.convert import save
    from l32jax.sharding import make_mesh

    sets = partial(open_sets, calibration=calibration, held_out=held_out, rows=rows, length=length)
    before = _config_of(source)
    target = _target(before, to, layers, given)
    if destination.endswith(".gguf") and target.vision is not None:
        raise InputError(f"destination {destination!r}: GGUF holds text only; choose another name")
    try:
        with stoppable(), closing(Bar()) as bar:
            devices = make_mesh(MeshConfig.parse(mesh))
            model = api.load(source, mesh=devices, dtype=dtype, tokenizer=tokenizer)
            pruned = _prune(model, target, sets, bar)
            model.config, model.params = pruned.config, pruned.params
            with _reported(pruned, destination, {"source": source, "calibration": calibration}):
                notes = save(model, destination)
    except KeyboardInterrupt:
        print("l32jax: stopped; nothing was written", file=sys.stderr)
        return 130
    for note in notes:
        print(f"l32jax: {note}", file=sys.stderr)
    Console(highlight=False).print(table(before, pruned))
    print(f"{destination} is written.")
    return 0


def _check(to: str, sizes: dict[str, int | None], destination: str, rows: int, length: int) -> None:
    """What can be said before anything is read."""
    given = [name for name, size in sizes.items() if size is not None]
    named = [f"--{name.removeprefix('num_').replace('_', '-')}" for name in given]
    if to != "custom" and named:
        raise InputError(f"{named[0]} with --to {to}, which says all sizes: use --to custom")
    if to == "custom" and not named:
        raise InputError("--to custom without a size: give --layers, --mlp-dim or another")
    if rows < 1 or length < 2:
        raise InputError(f"--rows {rows} --length {length}: give at least 1 row of 2 tokens")
    if "://" in destination:
        raise InputError(
            f"destination {destination!r}: write it to a disk, and let `l32jax convert` copy it"
        )
    parent = Path(destination).absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if os.path.lexists(folder))
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise InputError(f"destination {destination!r}: nothing can be written to {existing}")
    for path in (destination, f"{destination}.{REPORT}"):
        if os.path.lexists(path):
            raise InputError(f"destination {path!r}: it exists; choose another name")


def _config_of(source: str) -> LlamaConfig:
    """Read by itself, so that a target that cannot be is told before weights are read."""
    from l32jax.checkpoint.formats import open_checkpoint

    if source in PRESETS:
        return PRESETS[source]
    return open_checkpoint(source, verified=False).config


def _target(config: LlamaConfig, to: str, layers: int | None, sizes: dict[str, int]) -> LlamaConfig:
    """InputError unless pruning reaches it."""
    from l32jax.compress.target import require_reachable

    target = PRESETS[to] if to != "custom" else _custom(config, layers, sizes)
    require_reachable(config, target)
    return target


def _custom(config: LlamaConfig, layers: int | None, sizes: dict[str, int]) -> LlamaConfig:
    pattern = len(config.decoder.group_pattern)
    if layers is not None:
        if layers % pattern:
            raise InputError(
                f"--layers {layers}: the model's layers go in groups of {pattern}; give a multiple"
            )
        sizes = sizes | {"num_groups": layers // pattern}
    return replace(config, decoder=replace(config.decoder, **sizes))


def _prune(model: "Model", target: LlamaConfig, sets: Callable[..., Any], bar: Bar) -> "Pruned":
    import jax

    from l32jax.compress.prune import prune as run

    with jax.set_mesh(model.mesh):
        opened = sets(model.config, model.require_tokenizer(), model.mesh)
        params, model.params = model.params, None  # held once, where they are not needed again
        return run(model.config, params, opened.calibration, opened.held_out, target, progress=bar)


@contextmanager
def _reported(pruned: "Pruned", destination: str, about: dict[str, str]) -> Iterator[None]:
    """The report has its name when what it is about is written, and is gone if that fails."""
    from l32jax.compress.report import as_json

    path = Path(f"{destination}.{REPORT}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(as_json(pruned, about))
    try:
        yield
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
