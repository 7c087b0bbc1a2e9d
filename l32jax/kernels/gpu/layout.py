"""How arrays are cut into tiles for the GPU kernels, and which tiles meet."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from l32jax.kernels import intervals


class Tile(NamedTuple):
    """Queries and keys that meet in one product; warps of a program; stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# By pass, dtype and the largest head size served: what spills no registers on an H100
# (benchmarks/gpu_registers.py) and fits the 99 KiB of shared memory of small cards. Products of
# float32 are exact, without tensor cores: for checking, not for training.
TILES = {
    ("forward", "bfloat16", 64): Tile(128, 64, 8, 3),
    ("forward", "bfloat16", 128): Tile(128, 64, 8, 3),
    ("forward", "float32", 128): Tile(32, 16, 4, 2),
    ("dq", "bfloat16", 64): Tile(128, 64, 8, 3),
    ("dq", "bfloat16", 128): Tile(128, 64, 8, 2),
    ("dq", "float32", 128): Tile(32, 32, 8, 2),
    ("dkv", "bfloat16", 64): Tile(64, 128, 8, 3),
    ("dkv", "bfloat16", 128): Tile(64, 128, 8, 2),
    ("dkv", "float32", 128): Tile(32, 32, 8, 2),
}
SMALLEST_PIECE = 16  # of a head: what tensor cores contract at once


class Sizes(NamedTuple):
    """Of one call; lengths and head size are filled up to what the tile needs."""

    batch: int
    heads: int  # of keys
    group: int
    time: int
    num_keys: int
    head_dim: int

    @property
    def queries(self) -> tuple[int, int, int, int]:
        """The shape of queries inside the kernels; batch row and key head are one dimension."""
        return self.batch * self.heads, self.group, self.time, self.head_dim

    @property
    def keys(self) -> tuple[int, int, int]:
        """The shape of keys and values inside the kernels."""
        return self.batch * self.heads, self.num_keys, self.head_dim


class Specs(NamedTuple):
    """How programs are numbered, and what one of them sees of each kind of array."""

    grid: tuple[int, ...]
    spans: pl.BlockSpec
    bounds: pl.BlockSpec
    queries: pl.BlockSpec
    scores: pl.BlockSpec  # one number a query: lse, delta
    keys: pl.BlockSpec


def tile_of(name: str, q: Any, k: Any) -> tuple[Tile, Sizes]:
    """The tile for these arrays, and the sizes to which it makes them grow."""
    batch, heads, group, time, head_dim = q.shape
    served = [size for of, dtype, size in TILES if (of, dtype) == (name, q.dtype.name)]
    size = min((size for size in served if size >= head_dim), default=None)
    if size is None:
        raise ValueError(
            f"No tile for {q.dtype.name} heads of {head_dim}: "
            f"the GPU kernels take bfloat16 and float32, and heads of up to 128."
        )
    tile = TILES[name, q.dtype.name, size]
    grown = (_up(time, tile.rows), _up(k.shape[2], tile.keys), _up(head_dim, SMALLEST_PIECE))
    return tile, Sizes(batch, heads, group, *grown)


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def specs_by_rows(tile: Tile, sizes: Sizes) -> Specs:
    """Programs that hold queries: of the heads that share keys first, to share them in the cache.

    The last rows come first: those of causal text see most keys, and nobody should wait for them.
    """
    last = sizes.time // tile.rows - 1
    return Specs(
        grid=(sizes.group, last + 1, sizes.batch * sizes.heads),
        spans=pl.BlockSpec((None, None, 4), lambda g, i, k: (k, last - i, 0)),
        bounds=pl.BlockSpec((None, tile.rows), lambda g, i, k: (k, last - i)),
        queries=pl.BlockSpec(
            (None, None, tile.rows, sizes.head_dim), lambda g, i, k: (k, g, last - i, 0)
        ),
        scores=pl.BlockSpec((None, None, tile.rows), lambda g, i, k: (k, g, last - i)),
        keys=pl.BlockSpec((None, *sizes.keys[1:]), lambda g, i, k: (k, 0, 0)),
    )


def specs_by_keys(tile: Tile, sizes: Sizes) -> Specs:
    """Programs that hold keys; the first keys of causal text, seen by most, come first."""
    return Specs(
        grid=(sizes.num_keys // tile.keys, sizes.batch * sizes.heads),
        spans=pl.BlockSpec((None, None, 4), lambda i, k: (k, i, 0)),
        bounds=pl.BlockSpec((None, sizes.time), lambda i, k: (k, 0)),
        queries=pl.BlockSpec((None, *sizes.queries[1:]), lambda i, k: (k, 0, 0, 0)),
        scores=pl.BlockSpec((None, *sizes.queries[1:-1]), lambda i, k: (k, 0, 0)),
        keys=pl.BlockSpec((None, tile.keys, sizes.head_dim), lambda i, k: (k, i, 0)),
    )


def backward_specs(specs: Specs) -> list[pl.BlockSpec]:
    """Of spans, start, stop, q, k, v, lse, delta and dout."""
    bounds, keys, scores = [[spec] * 2 for spec in (specs.bounds, specs.keys, specs.scores)]
    return [specs.spans, *bounds, specs.queries, *keys, *scores, specs.queries]


def cost(sizes: Sizes, dtype, *, products: int) -> pl.CostEstimate:
    """At most: as if every query saw every key."""
    pairs = sizes.batch * sizes.heads * sizes.group * sizes.time * sizes.num_keys
    elements = math.prod(sizes.queries) + math.prod(sizes.keys)
    return pl.CostEstimate(
        flops=2 * products * pairs * sizes.head_dim,
        transcendentals=pairs,
        bytes_accessed=2 * elements * dtype.itemsize,
    )


def fill(sizes: Sizes, *arrays) -> list[Array]:
    """Of q, k, v, lse, delta, dout as many as there are, filled up with zeros, "b k" as one."""
    row, key = (sizes.time, sizes.head_dim), (sizes.num_keys, sizes.head_dim)
    tails = (row, key, key, row[:1], row[:1], row)
    return [_fold(array, tail) for array, tail in zip(arrays, tails, strict=False)]


def _fold(array, tail: tuple[int, ...]):
    kept = array.ndim - len(tail)
    more = [(0, to - size) for to, size in zip(tail, array.shape[kept:], strict=True)]
    filled = jnp.pad(array, [(0, 0)] * kept + more)
    return filled.reshape(-1, *array.shape[2:kept], *tail)


def unfold(array, shape: tuple[int, ...]):
    """What the callers' array of this shape holds of an array of the kernels."""
    inner = array.shape[1:]
    cut = tuple(slice(size) for size in shape[2:])
    return array.reshape(*shape[:2], *inner)[(slice(None), slice(None), *cut)]


def _spans(
    active: Bool[Array, "bk blocks others"], whole: Bool[Array, "bk blocks others"]
) -> Int[Array, "bk blocks 4"]:
    """Of the other side's blocks, for each block: first, whole_first, whole_last, last.

    What is outside [first, last) is not active, what is inside [whole_first, whole_last) is whole.
    Gaps between active blocks are visited in vain, under a mask; causal packed text has none.
    """
    count = active.shape[-1]
    first = jnp.argmax(active, axis=-1)
    last = jnp.where(active.any(axis=-1), count - jnp.argmax(active[..., ::-1], axis=-1), 0)
    whole_first = jnp.where(whole.any(axis=-1), jnp.argmax(whole, axis=-1), first)
    ends = ~whole & (jnp.arange(count) >= whole_first[..., None])
    whole_last = jnp.where(ends.any(axis=-1), jnp.argmax(ends, axis=-1), count)
    return jnp.stack([first, whole_first, whole_last, last], axis=-1).astype(jnp.int32)


class Met(NamedTuple):
    """What one pass needs to know of the intervals: the bounds, filled up, and the walks."""

    start: Int[Array, "bk rows"]
    stop: Int[Array, "bk rows"]
    spans: Int[Array, "bk blocks 4"]


class Plan(NamedTuple):
    """Of all three passes; layers that see the same share it."""

    forward: Met
    dq: Met
    dkv: Met


def make_plan(start: Int[Array, "b t"], stop: Int[Array, "b t"], q: Any, k: Any) -> Plan:
    """Which blocks meet; of q [b k g t h] and k [b k s h] only shapes and dtypes matter."""
    return Plan(*(_meetings(name, start, stop, q, k) for name in Plan._fields))


def _meetings(name: str, start, stop, q, k) -> Met:
    tile, sizes = tile_of(name, q, k)
    num_keys = k.shape[2]
    bounds = intervals.clip(start, stop, num_keys)
    start, stop = (jnp.repeat(bound, sizes.heads, axis=0) for bound in bounds)
    seen = intervals.hulls(start, stop, block=tile.rows, num_keys=num_keys)
    active = intervals.active(seen, block=tile.keys, num_keys=num_keys)
    whole = intervals.whole(seen, block=tile.keys, num_keys=num_keys)
    if name == "dkv":  # blocks of keys walk over blocks of rows
        active, whole = active.mT, whole.mT
    more = ((0, 0), (0, sizes.time - start.shape[1]))
    return Met(jnp.pad(start, more), jnp.pad(stop, more), _spans(active, whole))
