"""Flash attention by key intervals for NVIDIA GPUs (Ampere and later), through Pallas' Triton.

One program of the forward pass, and of that for dq, holds a block of queries of one head and
walks over the keys that some of them see. One program of the pass for dk and dv holds a block of
keys and walks over the queries, of all heads that share those keys, that see some of them: no
key or value is ever repeated, and no two programs write to one place. Blocks that nobody sees
are not visited; those that everybody sees come first, without a mask.

Triton's tiles are powers of two. Head sizes that are not are held in pieces (80 = 64 + 16), all
other dimensions are filled up with rows and keys that nobody sees.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from l32jax.kernels.gpu import layout
from l32jax.kernels.gpu.layout import Plan, Tile, cost, fill, make_plan, tile_of, unfold
from l32jax.kernels.gpu.programs import dkv_program, dq_program, forward_program


def forward(
    q: Float[Array, "b k g t h"],
    k: Float[Array, "b k s h"],
    v: Float[Array, "b k s h"],
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    *,
    scale: float,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b k g t h"], Float[Array, "b k g t"]]:
    """Attention in q's dtype, and the float32 log-sum-exp of the scores; bfloat16 or float32.

    Query row i sees the keys start[i] <= j < stop[i]; one that sees none gives 0 and -inf.
    `scale` is positive. `interpret` runs the kernel as plain JAX, on any platform.
    """
    met = (plan or make_plan(start, stop, q, k)).forward
    tile, sizes = tile_of("forward", q, k)
    specs = layout.specs_by_rows(tile, sizes)
    out, lse = pl.pallas_call(
        functools.partial(forward_program, tile=tile, scale=scale),
        grid=specs.grid,
        in_specs=[specs.spans, *[specs.bounds] * 2, specs.queries, *[specs.keys] * 2],
        out_specs=[specs.queries, specs.scores],
        out_shape=[
            jax.ShapeDtypeStruct(sizes.queries, q.dtype),
            jax.ShapeDtypeStruct(sizes.queries[:-1], jnp.float32),
        ],
        compiler_params=_compiler_params(tile),
        cost_estimate=cost(sizes, q.dtype, products=2),
        interpret=interpret,
        name="flash_forward",
    )(met.spans, met.start, met.stop, *fill(sizes, q, k, v))
    return unfold(out, q.shape), unfold(lse, q.shape[:-1])


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
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b k g t h"], Float[Array, "b k s h"], Float[Array, "b k s h"]]:
    """The float32 gradients by q, k and v, from what `forward` was given and gave.

    `lse` and `delta` are float32; delta = sum(dout * out, -1) minus the cotangent of lse. Rows
    that see nothing, and keys that nobody sees, get exact zeros.
    """
    plan = plan or make_plan(start, stop, q, k)
    arrays = (q, k, v, lse, delta, dout)
    dq = _dq(plan.dq, *arrays, scale=scale, interpret=interpret)
    return dq, *_dkv(plan.dkv, *arrays, scale=scale, interpret=interpret)


def _dq(met: layout.Met, q, k, v, lse, delta, dout, *, scale, interpret):
    tile, sizes = tile_of("dq", q, k)
    specs = layout.specs_by_rows(tile, sizes)
    dq = pl.pallas_call(
        functools.partial(dq_program, tile=tile, scale=scale),
        grid=specs.grid,
        in_specs=layout.backward_specs(specs),
        out_specs=specs.queries,
        out_shape=jax.ShapeDtypeStruct(sizes.queries, jnp.float32),
        compiler_params=_compiler_params(tile),
        cost_estimate=cost(sizes, q.dtype, products=3),
        interpret=interpret,
        name="flash_dq",
    )(met.spans, met.start, met.stop, *fill(sizes, q, k, v, lse, delta, dout))
    return unfold(dq, q.shape)


def _dkv(met: layout.Met, q, k, v, lse, delta, dout, *, scale, interpret):
    tile, sizes = tile_of("dkv", q, k)
    specs = layout.specs_by_keys(tile, sizes)
    shape = jax.ShapeDtypeStruct(sizes.keys, jnp.float32)
    dk, dv = pl.pallas_call(
        functools.partial(dkv_program, tile=tile, scale=scale),
        grid=specs.grid,
        in_specs=layout.backward_specs(specs),
        out_specs=[specs.keys] * 2,
        out_shape=[shape] * 2,
        compiler_params=_compiler_params(tile),
        cost_estimate=cost(sizes, q.dtype, products=4),
        interpret=interpret,
        name="flash_dkv",
    )(met.spans, met.start, met.stop, *fill(sizes, q, k, v, lse, delta, dout))
    return unfold(dk, k.shape), unfold(dv, v.shape)


def _compiler_params(tile: Tile) -> triton.CompilerParams:
    return triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
