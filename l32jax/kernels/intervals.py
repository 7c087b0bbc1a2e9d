"""Key intervals, and what a block of query rows sees.

Query row i of a batch row sees the keys start[i] <= j < stop[i] and nothing else. Rows with
stop <= start see nothing. What a kernel needs of a block of rows is four numbers: the keys that
some row sees lie in [first, last), those that every row sees are [every_first, every_last).
Blocks of keys outside the first range are neither loaded nor computed, those inside the second
need no mask.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Hulls(NamedTuple):
    """Of each block of query rows; all four are 0 where no row sees anything."""

    first: Int[Array, "b blocks"]
    last: Int[Array, "b blocks"]
    every_first: Int[Array, "b blocks"]
    every_last: Int[Array, "b blocks"]


def clip(
    start: Int[Array, "b t"], stop: Int[Array, "b t"], num_keys: int
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """The same intervals inside [0, num_keys); empty ones become (0, 0)."""
    start, stop = jnp.clip(start, 0, num_keys), jnp.clip(stop, 0, num_keys)
    sees = stop > start
    return jnp.where(sees, start, 0), jnp.where(sees, stop, 0)


def shift(
    start: Int[Array, "b t"], stop: Int[Array, "b t"], offset: Int[Array, ""] | int, num_keys: int
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """The intervals as seen from a shard that holds the keys [offset, offset + num_keys)."""
    return clip(start - offset, stop - offset, num_keys)


def hulls(start: Int[Array, "b t"], stop: Int[Array, "b t"], *, block: int, num_keys: int) -> Hulls:
    """The hulls of blocks of `block` rows; the last is filled up with rows that see nothing."""
    start, stop = clip(start, stop, num_keys)
    padding = ((0, 0), (0, -start.shape[1] % block))
    shape = (start.shape[0], -1, block)
    start, stop = (jnp.pad(bound, padding).reshape(shape) for bound in (start, stop))
    sees = stop > start
    first = jnp.where(sees, start, num_keys).min(axis=-1)
    last = stop.max(axis=-1)
    every_first, every_last = start.max(axis=-1), stop.min(axis=-1)
    some, every = last > first, every_last > every_first
    return Hulls(
        jnp.where(some, first, 0),
        last,
        jnp.where(every, every_first, 0),
        jnp.where(every, every_last, 0),
    )


def active(seen: Hulls, *, block: int, num_keys: int) -> Bool[Array, "b blocks key_blocks"]:
    """Which blocks of `block` keys hold a key inside the hull of each block of rows."""
    begin = jnp.arange(-(-num_keys // block)) * block
    return (seen.first[..., None] < begin + block) & (begin < seen.last[..., None])


def whole(seen: Hulls, *, block: int, num_keys: int) -> Bool[Array, "b blocks key_blocks"]:
    """Which blocks of `block` keys are seen in full by every row: no mask is needed there."""
    begin = jnp.arange(-(-num_keys // block)) * block
    return (seen.every_first[..., None] <= begin) & (begin + block <= seen.every_last[..., None])


def merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention over two sets of keys from that over each: (out [... t h], lse [... t]) pairs.

    Both are float32; lse is -inf where a row saw nothing.
    """
    (out_a, lse_a), (out_b, lse_b) = one, other
    top = jnp.maximum(lse_a, lse_b)
    safe = jnp.where(top > -jnp.inf, top, 0)
    weight_a, weight_b = jnp.exp(lse_a - safe), jnp.exp(lse_b - safe)
    total = weight_a + weight_b
    share = 1 / jnp.where(total > 0, total, 1)
    out = out_a * (weight_a * share)[..., None] + out_b * (weight_b * share)[..., None]
    return out, safe + jnp.log(total)
