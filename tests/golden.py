"""Results of Meta's own code, and of transformers, on small random models (see tests/data)."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from l32jax.checkpoint import meta
from l32jax.checkpoint.engine import slices
from l32jax.checkpoint.engine.sources import Source
from l32jax.config import Compat, DecoderConfig, LlamaConfig, RopeScaling, VisionConfig
from l32jax.model.attention import Interval
from l32jax.model.llama import Images, abstract_params, bind, forward
from l32jax.model.parameters import on_mesh
from l32jax.sharding import single_device_mesh

DATA = Path(__file__).parent / "data"

TEXT = LlamaConfig(
    decoder=DecoderConfig(
        vocab_size=256,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=256,
        num_groups=3,
        rope_scaling=RopeScaling(factor=8.0),
    )
)
VISION = LlamaConfig(
    decoder=dataclasses.replace(
        TEXT.decoder,
        mlp_dim=224,
        num_groups=2,
        group_pattern=("self", "self", "self", "cross", "self"),
    ),
    vision=VisionConfig(
        image_size=56,
        embed_dim=64,
        num_heads=4,
        mlp_dim=256,
        num_local_layers=5,
        num_global_layers=2,
        taps=(1, 3, 4),
    ),
)


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def document(name: str):
    return json.loads((DATA / name).read_text())


def load_meta(name: str, config: LlamaConfig):
    weights = {k.removeprefix("w/"): v for k, v in arrays(name).items() if k.startswith("w/")}
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        targets = on_mesh(abstract_params(config), mesh)
    return slices.load(meta.open_tensors(Source.of(weights, name), config), targets)


def with_compat(config: LlamaConfig, **switches) -> LlamaConfig:
    return dataclasses.replace(config, compat=Compat(**switches))


def logits(config: LlamaConfig, params, tokens, **how) -> np.ndarray:
    """Of one document a row: [b t v] float32."""
    index = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (tokens.shape[0], 1))
    positions = how.pop("positions", index)

    @jax.jit
    def run(params, tokens, positions, how):
        model = bind(config, params)
        text = Interval(jnp.zeros_like(index), jnp.asarray(index + 1))
        states = forward(model, tokens, positions, text, **how).states
        return model.decoder.logits(states)

    with jax.set_mesh(single_device_mesh()):
        tokens, positions = (a.astype(np.int32) for a in (tokens, positions))
        return np.asarray(run(params, tokens, positions, how))


def images(tiles: np.ndarray, aspect: np.ndarray) -> Images:
    """One image a row; every tile is listed, so that any may be seen."""
    index = np.tile(np.arange(4, dtype=np.int32), (tiles.shape[0], 1))
    return Images(*map(jnp.asarray, (tiles, aspect.astype(np.int32), index)))


def seen(starts, num_tiles, length: int, tokens_per_tile: int) -> Interval:
    """What text sees that follows an image at `starts`; no image where it is None."""
    stop = np.zeros((len(starts), length), np.int32)
    for row, (start, tiles) in enumerate(zip(starts, num_tiles, strict=True)):
        if start is not None:
            stop[row, start:] = tiles * tokens_per_tile
    return Interval(jnp.zeros_like(stop), jnp.asarray(stop))
