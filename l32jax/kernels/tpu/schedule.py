"""The order in which the TPU kernels visit pairs of blocks: one of query rows, one of keys.

A grid over all pairs would spend a few hundred cycles on every pair that nobody sees: in a causal
row that is half of them, in a packed one nearly all. So the pairs that matter are listed, once a
step and for all layers, and the grid runs along the list, as long as it is. A kernel reads its
place from one 32-bit word a pair (scalar memory holds a quarter of a million).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from l32jax.kernels.intervals import Hulls, active, hulls, whole

# A word is, from its highest bit: block of rows (11 bits), block of keys (10), flags (9).
OPENS = 1  # the first pair of its output block: start from zero
CLOSES = 2  # the last one: write the block out
WHOLE = 4  # every row sees every key: no mask
PARTLY = 8  # some row sees some key
# Of the list by keys, for the gradient of the queries, which is added to in HBM. A run is a
# stretch of pairs that share their block of rows.
RUN_OPENS = 16
RUN_CLOSES = 32
FRESH = 64  # nothing has been added to this block of rows before
DONE = 128  # nothing will be added after
FINAL = 256  # no run comes after
FLAG_BITS, KEY_BITS, ROW_BITS = 9, 10, 11


@jax.tree_util.register_static
class Blocks(NamedTuple):
    """Sizes: query positions and keys of a block, and the keys that are computed at a time."""

    rows: int
    keys: int
    step: int


class Schedule(NamedTuple):
    """Made by `schedule` for intervals and lengths; valid for every layer that has them.

    The leading dimension of the lists is of `parts` per batch row: a part is what one core
    computes where batch rows and heads are too few for two.
    """

    seen: Hulls
    by_rows: Int[Array, "bp n"]
    by_keys: Int[Array, "bp n"]
    num_by_rows: Int[Array, "bp 1"]
    num_by_keys: Int[Array, "bp 1"]
    visited: Bool[Array, "bp blocks"]  # blocks of rows with a gradient, by part of the keys
    blocks: Blocks

    @property
    def parts(self) -> int:
        return self.by_rows.shape[0] // self.seen.first.shape[0]


def schedule(
    start: Int[Array, "b t"], stop: Int[Array, "b t"], *, num_keys: int, blocks: Blocks, parts: int
) -> Schedule:
    """The lists of pairs of blocks that meet, by blocks of rows and by blocks of keys."""
    seen = hulls(start, stop, block=blocks.rows, num_keys=num_keys)
    meets = active(seen, block=blocks.keys, num_keys=num_keys)
    full = whole(seen, block=blocks.keys, num_keys=num_keys)
    num_rows, num_key_blocks = meets.shape[1:]
    if num_rows > 1 << ROW_BITS or num_key_blocks > 1 << KEY_BITS:
        raise ValueError(
            f"{num_rows} blocks of {blocks.rows} queries and {num_key_blocks} of {blocks.keys} "
            f"keys: a word holds {1 << ROW_BITS} and {1 << KEY_BITS}; split rows over more devices"
        )
    if parts > min(num_rows, num_key_blocks):
        raise ValueError(
            f"{parts} parts of {num_rows} x {num_key_blocks} blocks: one would be empty"
        )
    kinds = jnp.where(full, WHOLE, jnp.where(meets, PARTLY, 0))
    by_rows, num_by_rows = _list(*_parts(kinds, parts))
    # The same with the roles changed. A block of rows is fresh, and done, once in every part.
    kinds, own = _parts(kinds.mT, parts)
    visits = jnp.cumsum(kinds > 0, axis=1)
    kinds |= jnp.where(visits == 1, FRESH, 0) | jnp.where(visits == visits[:, -1:], DONE, 0)
    by_keys, num_by_keys = _list(jnp.where(kinds & (WHOLE | PARTLY), kinds, 0), own, runs=True)
    visited = visits[:, -1] > 0
    return Schedule(seen, by_rows, by_keys, num_by_rows, num_by_keys, visited, blocks)


def _parts(
    kinds: Int[Array, "b outputs others"], parts: int
) -> tuple[Int[Array, "bp outputs others"], Bool[Array, "bp outputs"]]:
    """The pairs of each part, parts of a batch row one behind the other; and which are its own."""
    batch, num_outputs, num_others = kinds.shape
    own = jnp.arange(num_outputs) % parts == jnp.arange(parts)[:, None]
    kinds = jnp.where(own[..., None], kinds[:, None], 0)
    return kinds.reshape(batch * parts, num_outputs, num_others), jnp.tile(own, (batch, 1))


def _list(
    kinds: Int[Array, "bp outputs others"], own: Bool[Array, "bp outputs"], *, runs: bool = False
) -> tuple[Int[Array, "bp n"], Int[Array, "bp 1"]]:
    """Words of the pairs that have a kind, by output block, and how long each list is.

    An output block that meets nothing must still be written: it stands at the end, with the other
    block of the pair before it, which need not be loaded again.
    """
    meets = kinds > 0
    _, num_outputs, num_others = kinds.shape
    place = jnp.arange(num_outputs * num_others)
    counts = meets.sum(axis=2)
    ends = jnp.cumsum(counts, axis=1)
    num_meeting = ends[:, -1:]
    # Pairs: how many outputs end before this place, and the first others that each one meets.
    output = jnp.minimum((ends[:, None] <= place[:, None]).sum(axis=2), num_outputs - 1)
    within = place - jnp.take_along_axis(ends - counts, output, axis=1)
    others = _first_true(meets).reshape(len(meets), -1)
    other = jnp.take_along_axis(others, output * num_others + within % num_others, axis=1)
    last = jnp.take_along_axis(other, jnp.maximum(num_meeting - 1, 0), axis=1)
    # Then outputs that meet nothing, and copies of the last place, which do nothing.
    alone = own & (counts == 0)
    num_alone = alone.sum(axis=1, keepdims=True)
    beyond = jnp.clip(place - num_meeting, 0, jnp.maximum(num_alone - 1, 0))
    lonely = jnp.take_along_axis(_first_true(alone), beyond, axis=1)
    final = jnp.take_along_axis(output, jnp.maximum(num_meeting - 1, 0), axis=1)
    meeting, past = place < num_meeting, place >= num_meeting + num_alone
    output = jnp.where(meeting, output, jnp.where(num_alone > 0, lonely, final))
    other = jnp.where(meeting, other, last)

    kind = jnp.take_along_axis(kinds.reshape(others.shape), output * num_others + other, axis=1)
    flags = _edges(jnp.where(past, -1, output), OPENS, CLOSES) | jnp.where(meeting, kind, 0)
    if runs:
        flags |= _runs(other, meeting)
        output, other = other, output
    words = (((output << KEY_BITS) | other) << FLAG_BITS) | jnp.where(past, 0, flags)
    return words.astype(jnp.int32), (num_meeting + num_alone).astype(jnp.int32)


def _first_true(values: Bool[Array, "... n"]) -> Int[Array, "... n"]:
    """The places of what is true, in order, before those of what is not."""
    return jnp.argsort(~values, axis=-1, stable=True)


def _edges(values: Int[Array, "bp n"], opens: int, closes: int) -> Int[Array, "bp n"]:
    """Flags of the first and the last of each stretch of equal values."""
    changes = values[:, 1:] != values[:, :-1]
    first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    return jnp.where(first, opens, 0) | jnp.where(last, closes, 0)


def _runs(rows: Int[Array, "bp n"], meeting: Bool[Array, "bp n"]) -> Int[Array, "bp n"]:
    flags = _edges(jnp.where(meeting, rows, -1), RUN_OPENS, RUN_CLOSES)
    final = ~jnp.pad(meeting[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(meeting, flags | jnp.where(final, FINAL, 0), 0)


def row_block(word):
    return word >> (KEY_BITS + FLAG_BITS)


def key_block(word):
    return (word >> FLAG_BITS) & ((1 << KEY_BITS) - 1)
