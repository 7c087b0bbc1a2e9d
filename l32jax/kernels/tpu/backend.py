"""The TPU kernels as one backend (`context.Backend`): few queries have a kernel of their own."""

from typing import Any

from jaxtyping import Array, Float, Int

from l32jax.kernels.tpu import backward as gradients
from l32jax.kernels.tpu import decode, layout
from l32jax.kernels.tpu import forward as flash
from l32jax.kernels.tpu.schedule import Schedule

FEW_QUERIES = 8


def make_plan(
    start: Int[Array, "b t"], stop: Int[Array, "b t"], q: Any, k: Any
) -> Schedule | decode.Walk:
    """For the kernel that `forward` will take; of q and k shapes and dtypes matter."""
    if q.shape[3] > FEW_QUERIES:
        return layout.make_plan(start, stop, q, k)
    _, heads, num_keys, head_dim = k.shape
    block = decode.block_size(heads, num_keys, head_dim, k.dtype.itemsize)
    return decode.plan(start, stop, block=block, num_keys=num_keys)


def forward(
    q: Float[Array, "b k g t h"],
    k: Float[Array, "*l b k s h"],
    v: Float[Array, "*l b k s h"],
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    *,
    scale: float,
    layer: Int[Array, ""] | None = None,
    plan: Schedule | decode.Walk | None = None,
) -> tuple[Float[Array, "b k g t h"], Float[Array, "b k g t"]]:
    """Attention and its float32 log-sum-exp; with `layer`, to that one of stacked caches."""
    if q.shape[3] <= FEW_QUERIES:
        assert not isinstance(plan, Schedule)
        return decode.forward(q, k, v, start, stop, scale=scale, layer=layer, walk=plan)
    assert not isinstance(plan, decode.Walk)
    if layer is not None:
        k, v = k[layer], v[layer]
    return flash.forward(q, k, v, start, stop, scale=scale, plan=plan)


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
    plan: Schedule | decode.Walk | None = None,
) -> tuple[Float[Array, "b k g t h"], Float[Array, "b k s h"], Float[Array, "b k s h"]]:
    """The float32 gradients; one kernel for any number of queries."""
    schedule = plan if isinstance(plan, Schedule) else None
    arrays = (q, k, v, start, stop, lse, delta, dout)
    return gradients.backward(*arrays, scale=scale, plan=schedule)
