"""Attention of a few query rows against a long cache, on TPU: keys and values are read once.

Decoding is bound by memory, so the kernel walks over the blocks of keys that some query sees, and
over no others. The walk is a list of (batch row, block) pairs made from the intervals, and its
length is a dynamic grid bound: growing texts do not compile again, and short ones cost nothing
for the cache that they do not fill. All key heads of a block are one step, large enough for the
pipeline of copies to hide what a step costs besides. The list is cut into two halves of equal
length, one for each TensorCore of a v4 or v5p chip; a chip with one core walks them in turn.
A batch row that the cut divides has two partial results, merged by their log-sum-exp.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from l32jax.kernels import intervals
from l32jax.kernels.tpu.chips import LANES

LOWEST = float(jnp.finfo(jnp.float32).min)  # finite: -inf - -inf would be NaN
# Of the keys of one step; the values are as many, and the next step's are on their way. Larger
# blocks waste more of the copy where a text ends inside one, smaller ones do not hide their cost.
BLOCK_BYTES, BLOCK_KEYS = 2**19, 1024


class Walk(NamedTuple):
    """Which block of keys of which batch row each step takes, and what the batch rows see.

    Half n of the walk is the steps [n * half, (n + 1) * half). If their count is odd, the very
    last step is idle, and stays where the one before was. All int32, and read as scalars.
    """

    row: Int[Array, " steps"]
    block: Int[Array, " steps"]
    half: Int[Array, " 1"]
    count: Int[Array, " 1"]
    visits: Int[Array, "2 b"]  # 1 where a half of the walk visits a batch row
    seen: intervals.Hulls  # " b" each
    start: Int[Array, " bt"]
    stop: Int[Array, " bt"]

    def step(self, half, i):
        """The i-th of a half; also inside the kernel, where the fields are references."""
        return jnp.minimum(half * self.half[0] + i, self.count[0] - 1)


def forward(
    q: Float[Array, "b k g t h"],
    k: Float[Array, "*layers b k s h"],
    v: Float[Array, "*layers b k s h"],
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    *,
    scale: float,
    layer: Int[Array, ""] | int | None = None,
    walk: Walk | None = None,
    block: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "b k g t h"], Float[Array, "b k g t"]]:
    """Attention in q's dtype and its float32 log-sum-exp; bfloat16 or float32, t small.

    Query row i sees the keys start[i] <= j < stop[i]; one that sees none gives 0 and -inf.
    `block` keys of all key heads are read at a time: all, or a multiple of 128. Caches are best a
    multiple of 8 keys long: XLA may lay others out in a way that has to be copied.

    With `layer`, k and v are the stacked caches of all layers: a slice of these would be copied in
    full before the kernel reads what it needs. With `walk`, which is `plan` of the same intervals
    and block, layers that share it do not make it again.
    """
    batch, heads, shared, time, head_dim = q.shape
    if layer is None:
        k, v, layer = k[None], v[None], 0
    num_keys = k.shape[3]
    block = block or block_size(heads, num_keys, head_dim, k.dtype.itemsize)
    if walk is None:
        walk = plan(start, stop, block=block, num_keys=num_keys)
    rows = q.reshape(batch, heads, shared * time, head_dim)
    layer = jnp.reshape(layer, 1).astype(jnp.int32)
    out, lse = _attend(rows, k, v, walk, layer, scale=scale, block=block, interpret=interpret)

    # What no step of a half visits was never written.
    visited = walk.visits[..., None, None, None] == 1
    out, lse = jnp.where(visited, out, 0)[..., None], jnp.where(visited, lse, -jnp.inf)
    out, lse = intervals.merge((out[0], lse[0]), (out[1], lse[1]))
    return out.astype(q.dtype).reshape(q.shape), lse[..., 0].reshape(q.shape[:-1])


def block_size(heads: int, num_keys: int, head_dim: int, itemsize: int) -> int:
    """Keys of a step: about BLOCK_BYTES of all heads together, in whole tiles of lanes."""
    keys = BLOCK_BYTES // (heads * head_dim * itemsize)
    return min(max(keys // LANES, 1) * LANES, BLOCK_KEYS, num_keys)


def plan(start: Int[Array, "b t"], stop: Int[Array, "b t"], *, block: int, num_keys: int) -> Walk:
    """The walk over the blocks of `block` keys that some query sees."""
    batch = start.shape[0]
    start, stop = intervals.clip(start, stop, num_keys)
    seen = intervals.hulls(start, stop, block=start.shape[1], num_keys=num_keys)
    seen = intervals.Hulls(*(edge[:, 0] for edge in seen))
    first = seen.first // block
    blocks = pl.cdiv(seen.last, block) - first
    each = jnp.arange(batch)
    ends = jnp.sum(jnp.where(each <= each[:, None], blocks, 0), axis=1)
    begins = ends - blocks
    count = jnp.maximum(jnp.sum(blocks), 1)  # where nothing is seen, one block is masked in full
    half = pl.cdiv(count, 2)

    steps = jnp.arange(batch * pl.cdiv(num_keys, block))[:, None]
    here = (begins <= steps) & (steps < ends)
    row = jnp.sum(jnp.where(here, each, 0), axis=1)
    place = jnp.sum(jnp.where(here, first + steps - begins, 0), axis=1)
    visits = jnp.stack([begins < half, ends > half]) & (blocks > 0)
    flat = start.reshape(-1), stop.reshape(-1)
    walk = Walk(row, place, half[None], count[None], visits, seen, *flat)
    return jax.tree.map(lambda array: array.astype(jnp.int32), walk)


def _attend(q, k, v, walk: Walk, layer, *, scale, block, interpret):
    """The result over what each half visits of each batch row, and its lse: both "2 b k r h"."""
    batch, heads, rows, head_dim = q.shape
    # Tiles hold 128 lanes. Narrower heads lie across them instead of filling half of each, as
    # XLA itself lays such arrays out, so that this costs no copy.
    across = head_dim % LANES != 0
    if across:
        k, v = k.swapaxes(-1, -2), v.swapaxes(-1, -2)
    wide, narrow = (heads, rows, head_dim), (heads, rows, 1)
    queries, keys, results = _specs(wide, block, across)
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, block=block, across=across),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(2, walk.half[0]),
            in_specs=[queries, keys, keys],
            out_specs=[results, results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in (wide, narrow, narrow)],
        ),
        # The log-sum-exp is as wide as the result: XLA then merges them without a relayout.
        out_shape=[jax.ShapeDtypeStruct((2, batch, *wide), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(rows, k[0]),
        interpret=interpret,
        name="attention_decode",
    )(walk, layer, q, k, v)


def _specs(wide: tuple[int, int, int], block: int, across: bool):
    """What a step holds of the queries, of the keys (or values), and of a result."""
    heads, _, head_dim = wide

    def queries(half, i, walk, layer):
        return walk.row[walk.step(half, i)], 0, 0, 0

    def keys(half, i, walk, layer):
        step = walk.step(half, i)
        place = (0, walk.block[step]) if across else (walk.block[step], 0)
        return layer[0], walk.row[step], 0, *place

    def results(half, i, walk, layer):
        return half, walk.row[walk.step(half, i)], 0, 0, 0

    tile = (head_dim, block) if across else (block, head_dim)
    return (
        pl.BlockSpec((None, *wide), queries),
        pl.BlockSpec((None, None, heads, *tile), keys),
        pl.BlockSpec((None, None, *wide), results),
    )


def _cost(rows: int, k: Float[Array, "b k x y"]) -> pl.CostEstimate:
    """Of a full cache: how much of it is seen is not known when XLA schedules."""
    return pl.CostEstimate(
        flops=4 * rows * k.size,
        bytes_accessed=2 * k.size * k.dtype.itemsize,
        transcendentals=rows * k.shape[0] * k.shape[1] * max(k.shape[2:]),
    )


def _kernel(walk, layer, q, k, v, out, lse, mixed, top, total, *, scale, block, across):
    half, i = pl.program_id(0), pl.program_id(1)
    step = walk.step(half, i)
    row, begin = walk.row[step], walk.block[step] * block

    @pl.when((i == 0) | (row != walk.row[walk.step(half, jnp.maximum(i - 1, 0))]))
    def _():
        mixed[...] = jnp.zeros_like(mixed)
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)

    def accumulate(masked: bool):
        scores = _product(q[...], k[...], 1 if across else 2) * scale
        values = v[...]
        if masked:
            visible = _visible(walk, row, begin, scores.shape)
            scores = jnp.where(visible, scores, LOWEST)
            # What nobody sees may be NaN, and a weight of zero does not hide that.
            key = begin + jax.lax.broadcasted_iota(jnp.int32, values.shape, 2 if across else 1)
            some = (walk.seen.first[row] <= key) & (key < walk.seen.last[row])
            values = jnp.where(some, values, 0)
        new_top = jnp.maximum(top[...], scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        if masked:  # a row that has seen nothing yet has all its weights exp(LOWEST - LOWEST)
            weights = jnp.where(visible, weights, 0)
        decay = jnp.exp(top[...] - new_top)
        top[...] = new_top
        total[...] = decay * total[...] + weights.sum(axis=-1, keepdims=True)
        product = _product(weights.astype(values.dtype), values, 2 if across else 1)
        mixed[...] = decay * mixed[...] + product

    needed = half * walk.half[0] + i < walk.count[0]
    whole = (walk.seen.every_first[row] <= begin) & (begin + block <= walk.seen.every_last[row])
    pl.when(needed & whole)(lambda: accumulate(masked=False))
    pl.when(needed & ~whole)(lambda: accumulate(masked=True))

    @pl.when((i == walk.half[0] - 1) | (row != walk.row[walk.step(half, i + 1)]))
    def _():
        some = total[...] > 0
        share = jnp.where(some, total[...], 1)
        out[...] = mixed[...] / share
        log = jnp.where(some, top[...] + jnp.log(share), -jnp.inf)
        lse[...] = jnp.broadcast_to(log, lse.shape)


def _visible(walk, row, begin, shape):
    """Which scores "k r s" count; the rows of a head are its query heads, each with all times."""
    time = walk.start.shape[0] // walk.seen.first.shape[0]
    key = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 1) % time
    start = stop = jnp.zeros(shape, jnp.int32)
    for t in range(time):
        start = jnp.where(query == t, walk.start[row * time + t], start)
        stop = jnp.where(query == t, walk.stop[row * time + t], stop)
    return (start <= key) & (key < stop)


def _product(rows, block, axis):
    """Of each head; float32 is not rounded to bfloat16 on the way."""
    return jax.lax.dot_general(
        rows,
        block,
        (((2,), (axis,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST if block.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
