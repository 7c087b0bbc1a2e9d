"""The decoding kernel as a TPU would run it, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from l32jax.kernels import intervals
from l32jax.kernels.tpu import decode as tpu_decode

SCALE = 0.3
# Memory that nothing was written to is NaN.
TPU = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
# Each is a compilation; intervals and values are free: (b, t, s, k, g, h), block and dtype.
# Heads of 128 lie along the lanes, others across; the last blocks are whole, cut, and alone.
SHAPES = st.sampled_from(
    [
        ((3, 1, 21, 2, 4, 128), 8, "float32"),
        ((2, 3, 24, 1, 3, 16), 8, "bfloat16"),
        ((1, 8, 13, 2, 1, 20), 8, "float32"),
        ((2, 1, 5, 1, 8, 128), 5, "bfloat16"),
    ]
)


def definition(q, k, v, start, stop):
    """Float64, from all scores at once."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bkgth,bksh->bkgts", q, k) * SCALE
    key = np.arange(k.shape[2])
    visible = ((key >= start[..., None]) & (key < stop[..., None]))[:, None, None]
    scores = np.where(visible, scores, -np.inf)
    top = np.maximum(scores.max(axis=-1, keepdims=True), -1e300)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bkgts,bksh->bkgth", weights, v) / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        return out, (top + np.log(total))[..., 0]


@jax.jit(static_argnames=("block", "interpret"))
def run(q, k, v, start, stop, *, block, layer=None, interpret=TPU):
    return tpu_decode.forward(
        q, k, v, start, stop, scale=SCALE, layer=layer, block=block, interpret=interpret
    )


plan = jax.jit(tpu_decode.plan, static_argnames=("block", "num_keys"))
hulls = jax.jit(intervals.hulls, static_argnames=("block", "num_keys"))


def on_tpu(*arrays, **options):
    out, lse = run(*map(jnp.asarray, arrays), **options)
    return np.asarray(out, np.float32), np.asarray(lse)


def drawn(shape, seed: int, dtype="float32", size: float = 1.0):
    b, t, s, k, g, h = shape
    random = np.random.default_rng(seed)
    sizes = ((b, k, g, t, h), (b, k, s, h), (b, k, s, h))
    return [(size * random.standard_normal(each)).astype(jnp.dtype(dtype)) for each in sizes]


@st.composite
def cases(draw):
    shape, block, dtype = draw(SHAPES)
    b, t, s, *_ = shape
    # Ends may lie before the starts, and beyond the keys: nothing more is seen there.
    ends = st.lists(st.integers(-2, s + 2), min_size=b * t, max_size=b * t)
    start, stop = (np.reshape(draw(ends), (b, t)).astype(np.int32) for _ in range(2))
    if draw(st.booleans()):
        start = np.zeros_like(start)
    arrays = drawn(shape, draw(st.integers(0, 2**31)), dtype, draw(st.sampled_from([1, 5])))
    return arrays, start, stop, block


@settings(max_examples=50)
@given(cases())
def test_equals_the_definition(case):
    (q, k, v), start, stop, block = case
    out, lse = on_tpu(q, k, v, start, stop, block=block)
    right, right_lse = definition(q, k, v, start, stop)
    # Weights and the result are rounded to bfloat16; float32 suffers from large scores alone.
    limit = {"float32": 2e-5, "bfloat16": 2**-7}[q.dtype.name]
    largest = max(1, np.abs(np.float32(q)).max())
    np.testing.assert_allclose(out, right, rtol=0, atol=limit * np.abs(np.float32(v)).max())
    np.testing.assert_allclose(lse, right_lse, rtol=2e-6, atol=2e-6 * largest)

    empty = np.clip(stop, 0, k.shape[2]) <= np.clip(start, 0, k.shape[2])
    empty = np.broadcast_to(empty[:, None, None], lse.shape)
    assert not out[empty].any()
    assert (lse[empty] == -np.inf).all()
    assert np.isfinite(lse[~empty]).all()


@settings(max_examples=20)
@given(cases())
def test_keys_outside_the_hull_may_be_nan_and_change_not_a_bit(case):
    (q, k, v), start, stop, block = case
    # Of a batch row: between two queries' intervals may lie keys that no query sees.
    first, last, *_ = hulls(start, stop, block=start.shape[1], num_keys=k.shape[2])
    key = np.arange(k.shape[2])
    outside = np.asarray((key < first) | (key >= last))[:, None, :, None]
    before = on_tpu(q, k, v, start, stop, block=block)
    poisoned = (np.where(outside, np.nan, array).astype(array.dtype) for array in (k, v))
    after = on_tpu(q, *poisoned, start, stop, block=block)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=100)
@given(cases())
def test_the_walk_visits_every_needed_block_once_in_order(case):
    (_, k, _), start, stop, block = case
    num_keys = k.shape[2]
    walk = plan(start, stop, block=block, num_keys=num_keys)
    seen = hulls(start, stop, block=start.shape[1], num_keys=num_keys)
    needed = np.argwhere(np.asarray(intervals.active(seen, block=block, num_keys=num_keys))[:, 0])
    count, half = int(walk.count[0]), int(walk.half[0])
    assert count == max(len(needed), 1) and half == -(-count // 2)
    visited = np.stack([walk.row, walk.block], axis=1)
    np.testing.assert_array_equal(visited[: len(needed)], needed)
    for visits, part in zip(np.asarray(walk.visits), (needed[:half], needed[half:]), strict=True):
        assert set(np.flatnonzero(visits)) == set(part[:, 0])


def test_steps_follow_the_lengths_and_nothing_compiles_again():
    q, k, v = drawn((2, 1, 80, 1, 1, 16), 0)
    traces = []

    @jax.jit
    def traced(*arrays):
        traces.append(1)
        return tpu_decode.forward(*arrays, scale=SCALE, block=8, interpret=TPU)

    # An odd number of steps ends with an idle one, once with a row's only block before it.
    for lengths, half in ([80, 80], 10), ([1, 9], 2), ([9, 1], 2), ([0, 0], 1), ([33, 80], 8):
        stop = np.array(lengths, np.int32)[:, None]
        start = np.zeros_like(stop)
        assert plan(start, stop, block=8, num_keys=80).half == half
        out, _ = traced(*map(jnp.asarray, (q, k, v, start, stop)))
        np.testing.assert_allclose(out, definition(q, k, v, start, stop)[0], atol=1e-5)
    assert len(traces) == 1


def test_two_cores_do_not_race(capfd):
    racing = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    q, k, v = drawn((3, 2, 40, 1, 2, 16), 0)
    start, stop = np.array([[0, 3], [9, 9], [20, 0]], np.int32), np.full((3, 2), 31, np.int32)
    out, _ = on_tpu(q, k, v, start, stop, block=8, interpret=racing)
    np.testing.assert_allclose(out, definition(q, k, v, start, stop)[0], atol=1e-5)
    assert "RACE" not in "".join(capfd.readouterr()).upper()


def test_a_layer_of_stacked_caches_and_a_shared_walk_give_the_same():
    shape, block = (2, 1, 20, 2, 2, 16), 8
    (q, *one), (_, *other) = drawn(shape, 0), drawn(shape, 1)
    start, stop = np.zeros((2, 1), np.int32), np.array([[13], [20]], np.int32)
    stacked = [jnp.stack(pair) for pair in zip(one, other, strict=True)]

    @jax.jit
    def of_layer(layer, q, k, v, start, stop):
        walk = tpu_decode.plan(start, stop, block=block, num_keys=k.shape[-2])
        decode = functools.partial(tpu_decode.forward, scale=SCALE, block=block, interpret=TPU)
        return decode(q, k, v, start, stop, layer=layer, walk=walk)

    for layer, cache in enumerate((one, other)):
        right = on_tpu(q, *cache, start, stop, block=block)
        for ours, theirs in zip(of_layer(layer, q, *stacked, start, stop), right, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("heads", "num_keys", "head_dim", "keys"),
    [(8, 8192, 128, 256), (8, 8192, 64, 512), (1, 131072, 128, 1024), (32, 4096, 128, 128)],
)
def test_blocks_are_about_a_megabyte_a_step(heads, num_keys, head_dim, keys):
    assert tpu_decode.block_size(heads, num_keys, head_dim, 2) == keys
    assert tpu_decode.block_size(heads, 100, head_dim, 2) == 100
