"""Flash attention for TPU (Pallas, Mosaic): the backward pass, all three gradients in one kernel.

Scores and weights are computed again from the saved log-sum-exp, once for the three: five matrix
products a pair of blocks, where kernels for dq and for dk, dv apart need seven. The list runs by
blocks of keys, so dk and dv gather in VMEM. dq gathers in HBM: its blocks come in and go out
beside the products, which take several times as long. So nothing grows with the number of blocks,
and both cores of a chip have their own key heads (or, if there is one head, their own dq).

Here keys run down and rows across: what is one number per row is then one row of lanes, and three
of the five products need no transposition.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from l32jax.kernels.intervals import Hulls
from l32jax.kernels.padding import pad
from l32jax.kernels.tpu.chips import compiler_params, cost
from l32jax.kernels.tpu.forward import along_keys
from l32jax.kernels.tpu.layout import (
    LOG2_E,
    Interpret,
    Kernel,
    Operands,
    Pair,
    Specs,
    make_plan,
    product,
)
from l32jax.kernels.tpu.schedule import CLOSES, OPENS, Schedule
from l32jax.kernels.tpu.traffic import Traffic

NEVER = 1e30  # in place of a log-sum-exp of -inf: 2^(score - NEVER) is 0


def backward(
    q: Float[Array, "b k g t h"],
    k: Float[Array, "b k s h"],
    v: Float[Array, "b k s h"],
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    lse: Float[Array, "b k g t"],
    delta: Float[Array, "b k g t"],
    dout: Float[Array, "b k g t h"],
    *,
    scale: float,
    plan: Schedule | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, "b k g t h"], Float[Array, "b k s h"], Float[Array, "b k s h"]]:
    """The float32 gradients of q, k and v.

    delta: sum(dout * out, -1) minus the cotangent of lse.
    """
    plan = plan or make_plan(start, stop, q, k)
    blocks = plan.blocks
    operands = Operands.padded(q, k, v, start, stop, blocks)
    specs, kernel = Specs.of(operands, plan), Kernel.of(operands, plan, scale)
    batch, kv_heads, shared, time, head_dim = operands.q.shape
    lists = batch * plan.parts
    lse = pad(jnp.where(lse > -jnp.inf, lse * LOG2_E, NEVER), 3, blocks.rows, NEVER)
    of_keys = pltpu.VMEM((blocks.keys, head_dim), jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    sums, dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(plan.seen),
            grid=(lists, kv_heads, plan.num_by_keys.max()),
            in_specs=[
                *(specs.queries, specs.keys, specs.keys, specs.bounds),
                *(specs.queries, specs.row_values),
            ],
            out_specs=[anywhere, anywhere, specs.keys, specs.keys],
            scratch_shapes=[of_keys, of_keys, *Traffic.scratch(shared, blocks.rows, head_dim)],
        ),
        out_shape=[
            Traffic.sums(lists, kv_heads, time // blocks.rows, shared * blocks.rows, head_dim),
            jax.ShapeDtypeStruct((lists, *operands.q.shape[1:]), jnp.float32),
            jax.ShapeDtypeStruct(k.shape, jnp.float32),
            jax.ShapeDtypeStruct(v.shape, jnp.float32),
        ],
        compiler_params=compiler_params(),
        cost_estimate=cost(q, k, products=5),
        interpret=interpret,
        name="attention_backward",
    )(
        *(plan.by_keys, *plan.seen),
        *operands,
        *(pad(dout, 3, blocks.rows), jnp.stack([lse, pad(delta, 3, blocks.rows)], axis=2)),
    )
    del sums
    return _summed(dq, plan)[:, :, :, : q.shape[3]], dk, dv


def _summed(dq: Float[Array, "bp k g t h"], plan: Schedule) -> Float[Array, "b k g t h"]:
    """Over the parts of a batch row; blocks of rows that no key reached were never written."""
    visited = jnp.repeat(plan.visited, plan.blocks.rows, axis=1)[:, None, None, :, None]
    return jnp.where(visited, dq, 0).reshape(-1, plan.parts, *dq.shape[1:]).sum(axis=1)


def _kernel(
    kernel: Kernel,
    words, first, last, every_first, every_last,
    q, k, v, bounds, dout, row_values,
    sums, dq_out, dk_out, dv_out,
    dk, dv, dq, *for_traffic,
):  # fmt: skip
    pair = Pair.here(words, Hulls(first, last, every_first, every_last), kernel)
    traffic = Traffic(pair, words, sums, dq_out, dq, *for_traffic)

    @pl.when(pair.has(OPENS))
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    slot = traffic.arrive()

    def attend(index, masked):
        keys = pl.ds(index * kernel.blocks.step, kernel.blocks.step)
        queries, douts = (ref[0, 0].reshape(-1, ref.shape[-1]) for ref in (q, dout))
        scores = product(kernel, k[0, 0, keys], queries, (1, 1)) * (kernel.scale * LOG2_E)
        weights = jnp.exp2(scores - _across(row_values[0, 0, 0]))
        if masked:
            begin = pair.first_key + index * kernel.blocks.step
            weights = jnp.where(_visible(bounds[0], begin, scores.shape, kernel), weights, 0)
        dv[keys] += product(kernel, weights.astype(q.dtype), douts, (1, 0))
        by_weight = product(kernel, v[0, 0, keys], douts, (1, 1))
        by_score = (weights * (by_weight - _across(row_values[0, 0, 1]))).astype(q.dtype)
        dk[keys] += product(kernel, by_score, queries, (1, 0))
        dq[slot] += product(kernel, k[0, 0, keys].T, by_score, (1, 0))

    along_keys(kernel, pair, attend)
    traffic.leave(slot, kernel.scale)

    @pl.when(pair.has(CLOSES))
    def _():
        dk_out[0, 0] = dk[...] * kernel.scale
        dv_out[0, 0] = dv[...]


def _across(row_values: Array) -> Array:
    """[g rows] as one row [1 g * rows]; cheaper than a reshape, which would move every lane."""
    return jnp.concatenate([row_values[i : i + 1] for i in range(row_values.shape[0])], axis=1)


def _visible(bounds, begin, shape, kernel: Kernel) -> Array:
    """Which of the keys from `begin` on each stacked row sees."""
    key = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    start, stop = (jnp.concatenate([bounds[i : i + 1]] * kernel.shared, axis=1) for i in range(2))
    return (key >= start) & (key < stop)
