"""Attention split over devices is the same attention, and the devices share the work evenly."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l32jax.kernels import context, reference

SCALE = 0.3
BATCH, KV_HEADS, SHARED, TIME, HEAD_DIM = 4, 2, 2, 32, 8
NUM_KEYS = {"balanced": TIME, "contiguous": 48, "replicated": 13}
AXES = ("data", "fsdp", "context", "tensor")
MESHES = {
    "context=2": (1, 1, 2, 1),
    "context=4": (1, 1, 4, 1),
    "context=8": (1, 1, 8, 1),
    "data=2 context=2 tensor=2": (2, 1, 2, 2),
}
SPLITS = [
    ("gather", "balanced"),
    ("ring", "balanced"),
    ("gather", "contiguous"),
    ("ring", "contiguous"),
    ("ring", "replicated"),
]
QUERIES = P(("data", "fsdp"), "tensor", None, "context", None)
SCORES = P(("data", "fsdp"), "tensor", None, "context")
BOUNDS = P(("data", "fsdp"), "context")


class Case(NamedTuple):
    """What attention gets, and the cotangents of its two results."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray


def keys_spec(keys: str) -> P:
    return P(("data", "fsdp"), "tensor", None if keys == "replicated" else "context", None)


def case_specs(keys: str) -> Case:
    return Case(QUERIES, keys_spec(keys), keys_spec(keys), BOUNDS, BOUNDS, QUERIES, SCORES)


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    return jax.make_mesh(shape, AXES, devices=jax.devices()[: math.prod(shape)])


def place(case: Case, mesh: Mesh, keys: str) -> Case:
    shardings = (NamedSharding(mesh, spec) for spec in case_specs(keys))
    return Case(*map(jax.device_put, case, shardings))


def over(mesh: Mesh, backend: context.Backend, keys: str):
    """The two functions on whole arrays, each in one shard_map."""
    inputs = case_specs(keys)[:5]
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    forward = functools.partial(backend.forward, scale=SCALE)
    backward = functools.partial(backend.backward, scale=SCALE)
    return (
        mapped(forward, in_specs=inputs, out_specs=(QUERIES, SCORES)),
        mapped(backward, in_specs=(*inputs, SCORES, SCORES, QUERIES), out_specs=inputs[:3]),
    )


def differentiable(forward, backward):
    @jax.custom_vjp
    def attend(q, k, v, start, stop):
        return forward(q, k, v, start, stop)

    def keep(*inputs):
        out, lse = forward(*inputs)
        return (out, lse), (inputs, out, lse)

    def pull_back(kept, cotangents):
        inputs, out, lse = kept
        dout, dlse = cotangents
        delta = jnp.sum((dout * out).astype(jnp.float32), axis=-1) - dlse
        grads = backward(*inputs, lse, delta, dout)
        assert all(grad.dtype == jnp.float32 for grad in grads)
        return *(grad.astype(inputs[0].dtype) for grad in grads), None, None

    attend.defvjp(keep, pull_back)
    return attend


@functools.cache
def compiled(mesh_shape: tuple[int, ...], method: str | None, keys: str):
    """A function of a case: out, lse, dq, dk, dv."""
    mesh = mesh_of(mesh_shape)
    backend = reference
    if method:
        backend = context.split(reference, axis="context", method=method, keys=keys)
    attend = differentiable(*over(mesh, backend, keys))

    def loss(q, k, v, case):
        out, lse = attend(q, k, v, case.start, case.stop)
        finite = jnp.where(lse > -jnp.inf, lse, 0)
        return jnp.sum(out * case.dout) + jnp.sum(finite * case.dlse), (out, lse)

    @jax.jit
    def run(case):
        grads, results = jax.grad(loss, (0, 1, 2), has_aux=True)(case.q, case.k, case.v, case)
        return *results, *grads

    return lambda case: [np.asarray(array) for array in run(place(case, mesh, keys))]


def balance(case: Case, keys: str, order: np.ndarray) -> Case:
    """The case as it is stored: queries always balanced, keys if so said."""
    if keys == "balanced":
        case = case._replace(k=case.k[:, :, order], v=case.v[:, :, order])
    return case._replace(
        q=case.q[:, :, :, order],
        start=case.start[:, order],
        stop=case.stop[:, order],
        dout=case.dout[:, :, :, order],
        dlse=case.dlse[..., order],
    )


def in_row_order(results, keys: str, order: np.ndarray):
    out, lse, dq, dk, dv = results
    out, lse, dq = out[:, :, :, order], lse[..., order], dq[:, :, :, order]
    if keys == "balanced":
        dk, dv = dk[:, :, order], dv[:, :, order]
    return out, lse, dq, dk, dv


def causal(num_keys: int):
    stop = np.broadcast_to(np.arange(1, TIME + 1) * num_keys // TIME, (BATCH, TIME))
    return np.zeros_like(stop), stop


def packed(num_keys: int):
    """Causal documents end to end, and padding that sees nothing after them."""
    start, stop = (bound.copy() for bound in causal(num_keys))
    for row, cuts in enumerate([(0, 5, 32), (0, 16, 27), (0, 1, 2, 31), (0, 32)]):
        for first, last in zip(cuts, cuts[1:], strict=False):
            start[row, first:last] = first * num_keys // TIME
        start[row, cuts[-1] :] = stop[row, cuts[-1] :] = 0
    return start, stop


def scattered(num_keys: int):
    """Anything: beyond both ends, backwards, empty; no query of the last row sees a key."""
    start, stop = np.random.default_rng(0).integers(-4, num_keys + 5, (2, BATCH, TIME))
    stop[-1] = start[-1]
    return start, stop


def drawn(bounds, num_keys: int) -> Case:
    random = np.random.default_rng(1)
    rows = (BATCH, KV_HEADS, SHARED, TIME)
    shared = (BATCH, KV_HEADS, num_keys, HEAD_DIM)
    shapes = ((*rows, HEAD_DIM), shared, shared, (*rows, HEAD_DIM), rows)
    q, k, v, dout, dlse = (random.standard_normal(shape, np.float32) for shape in shapes)
    start, stop = (bound.astype(np.int32) for bound in bounds(num_keys))
    return Case(q, k, v, start, stop, dout, dlse)


@pytest.mark.parametrize("method, keys", SPLITS)
@pytest.mark.parametrize("mesh_shape", MESHES.values(), ids=MESHES)
def test_values_and_gradients_are_those_of_one_device(mesh_shape, method, keys):
    num_shards = mesh_shape[AXES.index("context")]
    order = context.balanced_order(TIME, num_shards)
    back = context.row_order(TIME, num_shards)
    for bounds in (causal, packed, scattered):
        case = drawn(bounds, NUM_KEYS[keys])
        expected = compiled((1, 1, 1, 1), None, keys)(case)
        stored = compiled(mesh_shape, method, keys)(balance(case, keys, order))
        for ours, theirs in zip(in_row_order(stored, keys, back), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method, keys", SPLITS)
def test_what_sees_or_is_seen_by_nothing_is_exactly_zero(method, keys):
    case = drawn(scattered, NUM_KEYS[keys])
    order, back = context.balanced_order(TIME, 4), context.row_order(TIME, 4)
    stored = compiled(MESHES["context=4"], method, keys)(balance(case, keys, order))
    out, lse, dq, dk, dv = in_row_order(stored, keys, back)
    key = np.arange(NUM_KEYS[keys])
    visible = (key >= case.start[..., None]) & (key < case.stop[..., None])
    sees, seen = visible.any(axis=2), visible.any(axis=1)
    empty = np.broadcast_to(~sees[:, None, None], lse.shape)
    assert empty.any() and not seen.all()
    assert not out[empty].any() and not dq[empty].any()
    assert np.array_equal(np.isneginf(lse), empty)
    unseen = np.broadcast_to(~seen[:, None], dk.shape[:-1])
    assert not dk[unseen].any() and not dv[unseen].any()


def cast(case: Case, dtype) -> Case:
    q, k, v, dout = (x.astype(dtype) for x in (case.q, case.k, case.v, case.dout))
    return case._replace(q=q, k=k, v=v, dout=dout)


@pytest.mark.parametrize("method", ["gather", "ring"])
def test_bfloat16_costs_little_more_than_its_rounding(method):
    case = cast(drawn(packed, TIME), jnp.bfloat16)
    order, back = context.balanced_order(TIME, 4), context.row_order(TIME, 4)
    run = compiled(MESHES["context=4"], method, "balanced")
    stored = run(balance(case, "balanced", order))
    expected = compiled((1, 1, 1, 1), None, "balanced")(cast(case, np.float32))
    for ours, theirs in zip(in_row_order(stored, "balanced", back), expected, strict=True):
        finite = np.isfinite(theirs)
        ours, theirs = ours[finite].astype(np.float32), theirs[finite]
        assert np.abs(ours - theirs).max() < 2**-6 * np.abs(theirs).max()


def equations(jaxpr):
    """Of a jaxpr and of all those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("method, keys", SPLITS[:4])
def test_only_gathering_takes_room_for_all_keys(method, keys):
    """In the ring, no array on a device has more positions than the device's share."""
    mesh, num_keys = mesh_of(MESHES["context=8"]), NUM_KEYS[keys]
    backend = context.split(reference, axis="context", method=method, keys=keys)
    q, k, v, start, stop, dout, dlse = place(drawn(causal, num_keys), mesh, keys)
    longest = max(BATCH, KV_HEADS, SHARED, HEAD_DIM, TIME // 8, num_keys // 8)
    forward, backward = over(mesh, backend, keys)
    for traced in (
        jax.make_jaxpr(forward)(q, k, v, start, stop),
        jax.make_jaxpr(backward)(q, k, v, start, stop, dlse, dlse, dout),
    ):
        (mapped,) = (each for each in traced.eqns if each.primitive.name == "shard_map")
        inside = list(equations(mapped.params["jaxpr"]))
        sizes = [size for each in inside for var in each.outvars for size in jnp.shape(var.aval)]
        names = {each.primitive.name for each in inside}
        assert (max(sizes) <= longest) == (method == "ring")
        assert ("all_gather" in names) == (method == "gather")
        assert ("ppermute" in names) == (method == "ring")


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 6))
def test_a_device_stores_an_early_chunk_and_a_late_one(num_shards, chunk):
    length = 2 * num_shards * chunk
    order = context.balanced_order(length, num_shards)
    back = context.row_order(length, num_shards)
    assert np.array_equal(order[back], np.arange(length))
    assert np.array_equal(back[order], np.arange(length))
    chunks = order.reshape(num_shards, 2, chunk)
    inside = np.arange(chunk)
    for shard, (early, late) in enumerate(chunks):
        assert np.array_equal(early, shard * chunk + inside)
        assert np.array_equal(late, (2 * num_shards - 1 - shard) * chunk + inside)


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 6))
def test_every_device_has_the_same_causal_work_at_every_step(num_shards, chunk):
    held = context.balanced_order(2 * num_shards * chunk, num_shards).reshape(num_shards, -1)
    visible = held[:, :, None, None] >= held  # device, its queries, device, its keys
    work = visible.sum(axis=(1, 3))
    assert len(set(work.sum(axis=1))) == 1
    device = np.arange(num_shards)
    for step in device:
        assert len(set(work[device, (device - step) % num_shards])) == 1
    assert work.max() - work.min() <= chunk  # what a device's own keys have more: diagonals
