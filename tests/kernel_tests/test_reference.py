"""The definition of attention, held against a slower and plainer one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.kernels.reference import attention
from l32jax.sharding import single_device_mesh

SCALE = 0.3
# Each shape is a compilation; intervals and values are free: (b, t, s, k, n / k, h).
SHAPES = st.sampled_from(
    [
        (1, 1, 1, 1, 1, 2),
        (1, 5, 7, 1, 3, 4),
        (2, 4, 4, 2, 2, 6),
        (3, 1, 9, 2, 1, 8),
        (1, 6, 3, 3, 1, 2),
    ]
)


def naive(q, k, v, start, stop) -> np.ndarray:
    """Float64, one query of one head at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    shared = q.shape[2] // k.shape[2]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = slice(max(start[b, t], 0), max(stop[b, t], 0))
        scores = k[b, keys, n // shared] @ q[b, t, n] * SCALE
        if scores.size:
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, keys, n // shared] / weights.sum()
    return out


@jax.jit
def run(q, k, v, start, stop):
    return attention(q, k, v, start, stop, scale=SCALE)


@jax.jit
def gradients(q, k, v, start, stop, seed):
    """Of a weighted sum of the result, by q, k and v."""

    def scalar(q, k, v):
        return jnp.sum(attention(q, k, v, start, stop, scale=SCALE).astype(jnp.float32) * seed)

    return jax.grad(scalar, (0, 1, 2))(q, k, v)


def on_one_device(function, *arrays):
    with jax.set_mesh(single_device_mesh()):
        return jax.tree.map(np.asarray, function(*map(jnp.asarray, arrays)))


def drawn(shape, seed: int, size: float = 1.0, dtype=np.float32):
    b, t, s, k, shared, h = shape
    random = np.random.default_rng(seed)
    sizes = ((b, t, k * shared, h), (b, s, k, h), (b, s, k, h))
    return [(size * random.standard_normal(each)).astype(dtype) for each in sizes]


@st.composite
def cases(draw):
    shape = draw(SHAPES)
    b, t, s = shape[:3]
    # Ends may lie before the starts, and beyond the keys: nothing more is seen there.
    ends = st.lists(st.integers(0, s + 2), min_size=b * t, max_size=b * t)
    start, stop = (np.reshape(draw(ends), (b, t)).astype(np.int32) for _ in range(2))
    size = draw(st.sampled_from([0.1, 1.0, 30.0]))
    return shape, drawn(shape, draw(st.integers(0, 2**31)), size), start, stop


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_naive_definition(case):
    _, (q, k, v), start, stop = case
    ours = on_one_device(run, q, k, v, start, stop)
    limit = 2e-5 * max(1, np.abs(v).max()) * max(1, np.abs(q).max())  # scores grow with q
    np.testing.assert_allclose(ours, naive(q, k, v, start, stop), rtol=0, atol=limit)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["float32", "bfloat16"]))
def test_empty_rows_are_exactly_zero_and_have_zero_gradients(case, dtype):
    (b, t, s, *_), arrays, start, stop = case
    arrays = [array.astype(jnp.dtype(dtype)) for array in arrays]
    empty = np.minimum(stop, s) <= start
    ours = on_one_device(run, *arrays, start, stop).astype(np.float32)
    assert np.isfinite(ours).all()
    assert not ours[empty].any()

    seed = np.random.default_rng(0).standard_normal(ours.shape).astype(np.float32)
    grads = on_one_device(gradients, *arrays, start, stop, seed)
    by_query, by_key, by_value = (grad.astype(np.float32) for grad in grads)
    assert all(np.isfinite(grad).all() for grad in (by_query, by_key, by_value))
    assert not by_query[empty].any()
    index = np.arange(s)
    seen = ((index >= start[..., None]) & (index < stop[..., None])).any(axis=1)
    assert not by_key[~seen].any()
    assert not by_value[~seen].any()


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_what_a_query_does_not_see_changes_not_a_bit(case, seed):
    shape, (q, k, v), start, stop = case
    _, other_keys, other_values = drawn(shape, seed, 100.0)
    key = np.arange(shape[2])
    before = on_one_device(run, q, k, v, start, stop)
    for b, t in np.ndindex(start.shape):
        unseen = (key < start[b, t]) | (key >= stop[b, t])
        new_k, new_v = k.copy(), v.copy()
        new_k[b, unseen], new_v[b, unseen] = other_keys[b, unseen], other_values[b, unseen]
        after = on_one_device(run, q, new_k, new_v, start, stop)
        np.testing.assert_array_equal(after[b, t], before[b, t])


def test_gradients_equal_finite_differences():
    shape = (2, 4, 4, 2, 2, 6)
    arrays = drawn(shape, 0)
    start = np.array([[0, 0, 1, 2], [0, 0, 0, 3]], np.int32)
    stop = np.array([[1, 2, 3, 4], [0, 2, 4, 4]], np.int32)
    seed, *direction = (np.float64(a) for a in [drawn(shape, 1)[0], *drawn(shape, 2)])
    grads = on_one_device(gradients, *arrays, start, stop, np.float32(seed))

    def scalar(step):
        moved = (a + step * d for a, d in zip(arrays, direction, strict=True))
        return np.sum(naive(*moved, start, stop) * seed)

    slope = (scalar(1e-5) - scalar(-1e-5)) / 2e-5
    ours = sum(np.sum(g * d) for g, d in zip(grads, direction, strict=True))
    assert ours == pytest.approx(slope, rel=1e-5)


def test_bfloat16_is_as_close_as_its_rounding():
    shape, random = (2, 16, 16, 2, 2, 8), np.random.default_rng(3)
    q, k, v = drawn(shape, 3)
    stop = np.sort(random.integers(1, 17, (2, 16))).astype(np.int32)
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    ours = on_one_device(run, *rounded, np.zeros_like(stop), stop).astype(np.float32)
    theirs = naive(*(np.float32(a) for a in rounded), np.zeros_like(stop), stop)
    assert np.abs(ours - theirs).max() < 2**-7 * np.abs(v).max()
