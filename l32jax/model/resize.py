"""Another image size for an image encoder that has learned one: its tables of places, resized."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from l32jax.config import VisionConfig
from l32jax.model.parameters import Params


def resize_positions(params: Params, vision: VisionConfig) -> Params:
    """The parameters of a vision model, fit for the image size of `vision`; the rest is shared.

    Bilinear between the corners of the grid (of all tiles together, for the table that has an entry
    a tile); class tokens keep theirs. So does Meta (llama-models, `multimodal/encoder_utils.py`).
    """
    position = params["vision"]["position"]
    if position["embedding"].shape[0] == vision.tokens_per_tile:
        return params
    resized = position | {
        "embedding": _of_one_tile(position["embedding"], vision.grid),
        "tile_embedding": _of_all_tiles(position["tile_embedding"], vision.grid),
    }
    return params | {"vision": params["vision"] | {"position": resized}}


def _of_one_tile(table: Float[Array, "p d"], grid: int) -> Float[Array, "q d"]:
    return _of_all_tiles(table[None, None], grid)[0, 0]


def _of_all_tiles(table: Float[Array, "c c p d"], grid: int) -> Float[Array, "c c q d"]:
    """The grids of neighbouring tiles are one grid, which is resized as a whole."""
    side, width, old = table.shape[0], table.shape[-1], math.isqrt(table.shape[2] - 1)
    canvas = table[:, :, 1:].reshape(side, side, old, old, width).swapaxes(1, 2)
    canvas = canvas.reshape(side * old, side * old, width).astype(jnp.float32)
    weights = _between_corners(side * old, side * grid)
    # An image has few places, and a half of a thousandth of one would be seen.
    product = jax.lax.Precision.HIGHEST
    canvas = jnp.einsum("yr,xc,rcd->yxd", weights, weights, canvas, precision=product)
    canvas = canvas.reshape(side, grid, side, grid, width).swapaxes(1, 2)
    places = canvas.reshape(side, side, grid * grid, width).astype(table.dtype)
    return jnp.concatenate([table[:, :, :1], places], axis=2)


def _between_corners(old: int, new: int) -> Float[Array, "new old"]:
    """What each new place takes from each old one; the first and the last of both coincide."""
    at = jnp.linspace(0, old - 1, new, dtype=jnp.float32)[:, None]
    return jnp.maximum(1 - jnp.abs(at - jnp.arange(old, dtype=jnp.float32)), 0)
