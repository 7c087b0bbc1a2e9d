"""Flash attention for TPU (Pallas, Mosaic): the forward pass.

The g query heads that share a key head are rows of one product, so keys and values are read once
for all of them and never repeated. The grid runs along a list of the pairs of blocks that meet
(`schedule`); the softmax state stays in VMEM while a block of rows goes along its keys
(FlashAttention-2, Dao 2023, arXiv:2307.08691).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from l32jax.kernels.intervals import Hulls
from l32jax.kernels.tpu.chips import LANES, compiler_params, cost
from l32jax.kernels.tpu.layout import (
    LOG2_E,
    TURN,
    Interpret,
    Kernel,
    Operands,
    Pair,
    Specs,
    make_plan,
    product,
)
from l32jax.kernels.tpu.schedule import CLOSES, OPENS, PARTLY, WHOLE, Schedule

# A hidden score lies below the lowest running maximum: its weight is 2^-1e30, exactly zero, in
# rows that have seen nothing yet too.
HIDDEN, LOWEST = -2e30, -1e30


def forward(
    q: Float[Array, "b k g t h"],
    k: Float[Array, "b k s h"],
    v: Float[Array, "b k s h"],
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    *,
    scale: float,
    plan: Schedule | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, "b k g t h"], Float[Array, "b k g t"]]:
    """Attention and its log-sum-exp (float32; -inf where a row sees nothing).

    `plan` is `make_plan`'s for the same intervals and lengths; it is made here if absent.
    """
    plan = plan or make_plan(start, stop, q, k)
    operands = Operands.padded(q, k, v, start, stop, plan.blocks)
    specs, kernel = Specs.of(operands, plan), Kernel.of(operands, plan, scale)
    batch, kv_heads, shared, _, head_dim = operands.q.shape
    stacked = shared * plan.blocks.rows
    out, lse = pl.pallas_call(
        functools.partial(_kernel, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(plan.seen),
            grid=(batch * plan.parts, kv_heads, plan.num_by_rows.max()),
            in_specs=[specs.queries, specs.keys, specs.keys, specs.bounds],
            out_specs=[specs.queries, specs.sums],
            scratch_shapes=[
                pltpu.VMEM((stacked, head_dim), jnp.float32),
                *[pltpu.VMEM((stacked, LANES), jnp.float32)] * 2,
                *[pltpu.VMEM((plan.blocks.rows, LANES), jnp.int32)] * 2,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        compiler_params=compiler_params(),
        cost_estimate=cost(q, k, products=2),
        interpret=interpret,
        name="attention_forward",
    )(plan.by_rows, *plan.seen, *operands)
    return out, lse


def _kernel(
    kernel: Kernel,
    words, first, last, every_first, every_last,
    q, k, v, bounds,
    out, lse,
    mixed, top, total, start, stop,
):  # fmt: skip
    """One pair of blocks. Per row: `top` its largest score so far, `total` the sum of weights.

    What is one number per row stands in every lane, the layout that products with keys have.
    """
    pair = Pair.here(words, Hulls(first, last, every_first, every_last), kernel)

    @pl.when(pair.has(OPENS))
    def _():
        mixed[...] = jnp.zeros_like(mixed)
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)
        for index, column in enumerate((start, stop)):
            row = bounds[0, index : index + 1]
            column[...] = jnp.broadcast_to(row, (LANES, row.shape[1])).T

    def attend(index, masked):
        keys = pl.ds(index * kernel.blocks.step, kernel.blocks.step)
        scores = product(kernel, _stacked(q), k[0, 0, keys], (1, 1)) * (kernel.scale * LOG2_E)
        if masked:
            begin = pair.first_key + index * kernel.blocks.step
            scores = jnp.where(_visible((start, stop), begin, scores.shape, kernel), scores, HIDDEN)
        largest = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
        weights = jnp.exp2(scores - _repeated(largest, scores.shape[1]))
        fading = jnp.exp2(top[...] - largest)
        top[...] = largest
        total[...] = total[...] * fading + weights.sum(axis=1, keepdims=True)
        new = product(kernel, weights.astype(v.dtype), v[0, 0, keys], (1, 0))
        mixed[...] = mixed[...] * fading[:, : mixed.shape[1]] + new

    along_keys(kernel, pair, attend)

    @pl.when(pair.has(CLOSES))
    def _():
        seen = total[...] > 0
        share = jnp.where(seen, 1 / jnp.where(seen, total[...], 1), 0)
        out[0, 0] = (
            (mixed[...] * share[:, : mixed.shape[1]]).reshape(out.shape[2:]).astype(out.dtype)
        )
        sums = jnp.where(seen, top[...] / LOG2_E + jnp.log(total[...]), -jnp.inf)
        line, rows = sums.T[:1], kernel.blocks.rows
        for head in range(kernel.shared):  # a reshape would have to move lanes
            lse[0, 0, head : head + 1] = line[:, head * rows : (head + 1) * rows]


def along_keys(kernel: Kernel, pair: Pair, attend) -> None:
    """`attend(step, masked)` for each step of the block that some row sees.

    A block that all rows see whole is unrolled: its steps overlap. Of any other block, steps that
    all rows see whole come first, for they need no mask.
    """
    num_steps = kernel.blocks.keys // kernel.blocks.step

    @pl.when(pair.has(WHOLE))
    def _():
        for place in range(num_steps):
            attend(place, masked=False)

    @pl.when(pair.has(PARTLY))
    def _():
        @pl.loop(pair.whole, pair.broken, step=TURN)
        def _(index):
            for place in range(TURN):
                attend(index + place, masked=False)

    before, inside = pair.whole - pair.begin, pair.broken - pair.whole

    @pl.when(pair.has(PARTLY))
    def _():
        @pl.loop(0, pair.end - pair.begin - inside)
        def _(turn):
            attend(pair.begin + turn + jnp.where(turn < before, 0, inside), masked=True)


def _stacked(q) -> Array:
    """[g * rows, h]"""
    return q[0, 0].reshape(-1, q.shape[-1])


def _visible(bounds, begin, shape, kernel: Kernel) -> Array:
    """Which of the keys from `begin` on each stacked row sees."""
    key = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    start, stop = (
        _repeated(jnp.concatenate([bound[...]] * kernel.shared, axis=0), shape[1])
        for bound in bounds
    )
    return (key >= start) & (key < stop)


def _repeated(values: Array, width: int) -> Array:
    """Lanes that all hold the same, as wide as needed."""
    return jnp.tile(values, (1, -(-width // LANES)))[:, :width]
