"""The tokens of a row's used tiles, end to end: what its text attends to."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from l32jax.sharding import CONTEXT_AXIS, activation_spec

Shape = tuple[int, ...]


class Tiles(NamedTuple):
    """Tiles of an image, and tokens of each: those of an image are its tiles' in turn."""

    number: int
    length: int


def end_to_end(
    tokens: Float[Array, "b i t d"], index: Int[Array, "b m"], tiles: Tiles, where: PartitionSpec
) -> Float[Array, "b s d"]:
    """Those of each listed tile (image * number + tile), one behind the other.

    Tiles are copied one at a time. Of 1,601 tokens, a tile does not fill the rows of a TPU's
    registers: a gather between two reshapes moves all three times, and the compiler needs minutes
    for each of the reshapes.

    Args:
      where: of the result; devices that share the places of a row copy their part of the list.
    """
    copy = jax.shard_map(
        partial(_local, tiles=tiles, shared=where[1:2] == (CONTEXT_AXIS,)),
        in_specs=(activation_spec("b"), where),
        out_specs=where,
    )
    return copy(tokens, jax.sharding.reshard(index, where))


def _local(tokens: Array, index: Array, *, tiles: Tiles, shared: bool) -> Array:
    if shared:  # what comes back from the devices is summed
        tokens = jax.lax.pcast(tokens, CONTEXT_AXIS, to="varying")
    return _copied(tokens, index, tiles, tokens.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _copied(
    tokens: Float[Array, "b i t d"], index: Int[Array, "b m"], tiles: Tiles, shape: Shape
) -> Float[Array, "b s d"]:
    """Its gradient is written out: JAX's own would add as much as all tokens for each tile."""
    (rows, places), width = index.shape, shape[-1]

    def copy(n, listed):
        source, target = _places(n, index, tiles)
        tile = jax.lax.dynamic_slice(tokens, source, (1, 1, tiles.length, width))
        return jax.lax.dynamic_update_slice(listed, tile[0], target)

    listed = jnp.zeros_like(tokens, shape=(rows, places * tiles.length, width))
    return jax.lax.fori_loop(0, index.size, copy, listed)


def _forward(tokens: Array, index: Array, tiles: Tiles, shape: Shape) -> tuple[Array, Array]:
    return _copied(tokens, index, tiles, shape), index


def _backward(
    tiles: Tiles, shape: Shape, index: Int[Array, "b m"], gradient: Float[Array, "b s d"]
) -> tuple[Float[Array, "b i t d"], None]:
    """A tile that is listed twice, as empty places list the first one, gets the sum."""

    def add(n, total):
        target, source = _places(n, index, tiles)
        tile = jax.lax.dynamic_slice(gradient, source, (1, tiles.length, shape[-1]))[None]
        before = jax.lax.dynamic_slice(total, target, tile.shape)
        return jax.lax.dynamic_update_slice(total, before + tile, target)

    return jax.lax.fori_loop(0, index.size, add, jnp.zeros_like(gradient, shape=shape)), None


_copied.defvjp(_forward, _backward)


def _places(n: Array, index: Int[Array, "b m"], tiles: Tiles) -> tuple[tuple, tuple]:
    """Where the n-th tile begins among the tokens of all images, and in the list."""
    row, place = jnp.divmod(n, index.shape[1])
    image, tile = jnp.divmod(index[row, place], tiles.number)
    return (row, image, tile * tiles.length, 0), (row, place * tiles.length, 0)
