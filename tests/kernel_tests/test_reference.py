"""Attention as it is defined and as a CPU computes it, held against a slower and plainer one."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.kernels import intervals, reference

SCALE = 0.3
# Each shape is a compilation; intervals and values are free: (b, t, s, k, g, h).
SHAPES = st.sampled_from(
    [
        (1, 1, 1, 1, 1, 2),
        (1, 5, 7, 1, 3, 4),
        (2, 7, 10, 2, 2, 6),
        (3, 1, 9, 2, 1, 8),
        (1, 6, 3, 3, 1, 2),
    ]
)


def scaled(function):
    return jax.jit(partial(function, scale=SCALE))


def tiled(function):
    """In tiles so small that every shape but the first is several, the last ones filled up."""

    @jax.jit
    def run(*arrays):
        with mock.patch.multiple(reference, DENSE_SCORES=0, TILE_QUERIES=2, TILE_SCORES=6):
            return function(*arrays, scale=SCALE)

    return run


def by_rules(forward, backward):
    """Gradients by q, k, v of sum(out * dout) + sum(lse * dlse), over rows that see something."""

    def gradients(q, k, v, start, stop, dout, dlse):
        out, lse = forward(q, k, v, start, stop)
        delta = jnp.sum((dout * out).astype(jnp.float32), axis=-1) - dlse
        return backward(q, k, v, start, stop, lse, delta, dout)

    return gradients


@jax.jit
def by_autodiff(q, k, v, start, stop, dout, dlse):
    def attend(q, k, v):
        return reference.definition(q, k, v, start, stop, scale=SCALE)

    return jax.vjp(attend, q, k, v)[1]((dout.astype(q.dtype), dlse))


FORWARD = {
    "definition": scaled(reference.definition),
    "at once": scaled(reference.forward),
    "in tiles": tiled(reference.forward),
}
GRADIENTS = {
    "definition": by_autodiff,
    "at once": by_rules(FORWARD["at once"], scaled(reference.backward)),
    "in tiles": by_rules(FORWARD["in tiles"], tiled(reference.backward)),
}


def naive(q, k, v, start, stop) -> tuple[np.ndarray, np.ndarray]:
    """Float64, one query of one head at a time: the output, and the log-sum-exp."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out, lse = np.zeros_like(q), np.full(q.shape[:-1], -np.inf)
    for b, n, g, t in np.ndindex(lse.shape):
        keys = slice(max(start[b, t], 0), max(stop[b, t], 0))
        scores = k[b, n, keys] @ q[b, n, g, t] * SCALE
        if scores.size:
            weights = np.exp(scores - scores.max())
            out[b, n, g, t] = weights @ v[b, n, keys] / weights.sum()
            lse[b, n, g, t] = scores.max() + np.log(weights.sum())
    return out, lse


def naive_gradients(q, k, v, start, stop, dout, dlse) -> list[np.ndarray]:
    """In float64 too, of sum(out * dout) + sum(lse * dlse)."""
    q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
    dq, dk, dv = (np.zeros_like(a) for a in (q, k, v))
    out, lse = naive(q, k, v, start, stop)
    for b, n, g, t in np.ndindex(lse.shape):
        at, keys = (b, n, g, t), slice(max(start[b, t], 0), max(stop[b, t], 0))
        weights = np.exp(k[b, n, keys] @ q[at] * SCALE - lse[at])
        by_score = weights * ((v[b, n, keys] - out[at]) @ dout[at] + dlse[at]) * SCALE
        dq[at] += by_score @ k[b, n, keys]
        dk[b, n, keys] += np.outer(by_score, q[at])
        dv[b, n, keys] += np.outer(weights, dout[at])
    return [dq, dk, dv]


def drawn(shape, seed: int, size: float = 1.0, dtype=np.float32):
    """Queries, keys and values."""
    b, t, s, k, g, h = shape
    random = np.random.default_rng(seed)
    sizes = ((b, k, g, t, h), (b, k, s, h), (b, k, s, h))
    return [(size * random.standard_normal(each)).astype(dtype) for each in sizes]


def cotangents(shape, seed: int):
    b, t, _, k, g, h = shape
    random = np.random.default_rng([seed, 1])
    sizes = ((b, k, g, t, h), (b, k, g, t))
    return [random.standard_normal(each).astype(np.float32) for each in sizes]


def sees_nothing(start, stop, num_keys):
    return np.minimum(stop, num_keys) <= np.maximum(start, 0)


def per_query(rows, shape):
    """[b t] of every head."""
    return np.broadcast_to(rows[:, None, None], (shape[0], shape[3], shape[4], shape[1]))


@st.composite
def cases(draw, sizes=(0.1, 1.0, 30.0)):
    shape, seed = draw(SHAPES), draw(st.integers(0, 2**31))
    b, t, s = shape[:3]
    # Ends may lie before the starts, and on both sides beyond the keys: nothing is seen there.
    ends = st.lists(st.integers(-2, s + 2), min_size=b * t, max_size=b * t)
    start, stop = (np.reshape(draw(ends), (b, t)).astype(np.int32) for _ in range(2))
    return shape, drawn(shape, seed, draw(st.sampled_from(sizes))), start, stop


@pytest.mark.parametrize("way", FORWARD)
@settings(max_examples=100)
@given(case=cases())
def test_equals_the_naive_definition(way, case):
    _, (q, k, v), start, stop = case
    out, lse = FORWARD[way](q, k, v, start, stop)
    expected_out, expected_lse = naive(q, k, v, start, stop)
    limit = 2e-5 * max(1, np.abs(q).max())  # scores grow with q
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=limit * max(1, np.abs(v).max()))
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=limit)


@pytest.mark.parametrize("way", GRADIENTS)
@settings(max_examples=60)
@given(case=cases(sizes=(0.1, 1.0)), seed=st.integers(0, 2**31))
def test_gradients_equal_those_of_the_naive_definition(way, case, seed):
    shape, arrays, start, stop = case
    dout, dlse = cotangents(shape, seed)
    expected = naive_gradients(*arrays, start, stop, dout, dlse)
    ours = GRADIENTS[way](*arrays, start, stop, dout, dlse)
    for grad, same in zip(ours, expected, strict=True):
        np.testing.assert_allclose(grad, same, rtol=0, atol=2e-5 * max(1, np.abs(same).max()))


def test_gradients_of_the_naive_definition_equal_finite_differences():
    shape = (2, 4, 4, 2, 2, 6)
    arrays, direction = ([np.float64(a) for a in drawn(shape, seed)] for seed in (0, 2))
    start = np.array([[0, 0, 1, 2], [0, 0, 0, 3]], np.int32)
    stop = np.array([[1, 2, 3, 4], [1, 2, 4, 4]], np.int32)
    dout, dlse = cotangents(shape, 1)

    def scalar(step):
        moved = (a + step * d for a, d in zip(arrays, direction, strict=True))
        out, lse = naive(*moved, start, stop)
        return np.sum(out * dout) + np.sum(lse * dlse)

    slope = (scalar(1e-5) - scalar(-1e-5)) / 2e-5
    grads = naive_gradients(*arrays, start, stop, dout, dlse)
    ours = sum(np.sum(g * d) for g, d in zip(grads, direction, strict=True))
    assert ours == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=30)
@given(case=cases())
def test_empty_rows_are_exactly_zero_and_have_zero_gradients(way, dtype, case):
    shape, arrays, start, stop = case
    arrays = [array.astype(jnp.dtype(dtype)) for array in arrays]
    empty = per_query(sees_nothing(start, stop, shape[2]), shape)
    out, lse = FORWARD[way](*arrays, start, stop)
    assert out.dtype == dtype and lse.dtype == np.float32
    assert np.isfinite(out.astype(np.float32)).all()
    assert not np.asarray(out)[empty].any()
    assert (np.isneginf(lse) == empty).all()

    dout, dlse = cotangents(shape, 0)
    if way != "definition":  # what autodiff of a function of -inf may give
        dlse[empty] = np.nan
    grads = GRADIENTS[way](*arrays, start, stop, dout.astype(arrays[0].dtype), dlse)
    by_query, by_key, by_value = (np.asarray(grad, np.float32) for grad in grads)
    assert all(np.isfinite(grad).all() for grad in (by_query, by_key, by_value))
    assert not by_query[empty].any()
    index = np.arange(shape[2])
    seen = ((index >= start[..., None]) & (index < stop[..., None])).any(axis=1)
    assert not by_key.swapaxes(1, 2)[~seen].any()
    assert not by_value.swapaxes(1, 2)[~seen].any()


@pytest.mark.parametrize("way", FORWARD)
@settings(max_examples=15)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_what_a_query_does_not_see_changes_not_a_bit(way, case, seed):
    shape, (q, k, v), start, stop = case
    _, other_keys, other_values = drawn(shape, seed, 100.0)
    key = np.arange(shape[2])
    before = FORWARD[way](q, k, v, start, stop)
    for b, t in np.ndindex(start.shape):
        unseen = (key < start[b, t]) | (key >= stop[b, t])
        new_k, new_v = k.copy(), v.copy()
        new_k[b, :, unseen], new_v[b, :, unseen] = (
            other_keys[b, :, unseen],
            other_values[b, :, unseen],
        )
        after = FORWARD[way](q, new_k, new_v, start, stop)
        for new, old in zip(after, before, strict=True):
            np.testing.assert_array_equal(new[b, :, :, t], old[b, :, :, t])


@pytest.mark.parametrize("way", FORWARD)
def test_bfloat16_is_as_close_as_its_rounding(way):
    shape, random = (2, 16, 16, 2, 2, 8), np.random.default_rng(3)
    stop = np.sort(random.integers(1, 17, (2, 16))).astype(np.int32)
    start = np.zeros_like(stop)
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in drawn(shape, 3)]
    dout, dlse = cotangents(shape, 3)
    dout = jnp.asarray(dout, jnp.bfloat16)
    out, lse = FORWARD[way](*rounded, start, stop)
    grads = GRADIENTS[way](*rounded, start, stop, dout, dlse)
    expected_out, expected_lse = naive(*rounded, start, stop)
    expected = naive_gradients(*rounded, start, stop, dout, dlse)
    assert np.abs(out - expected_out).max() < 2**-7 * np.abs(expected_out).max()
    assert np.abs(lse - expected_lse).max() < 1e-5
    for grad, same in zip(grads, expected, strict=True):
        assert np.abs(grad - same).max() < 2**-7 * np.abs(same).max()
        assert way == "definition" or grad.dtype == np.float32


@settings(max_examples=60)
@given(case=cases(sizes=(0.1, 1.0)), data=st.data())
def test_halves_of_the_keys_merge_into_the_whole(case, data):
    shape, (q, k, v), start, stop = case
    cut = data.draw(st.integers(0, shape[2]))
    halves = (
        naive_half(q, k[:, :, part], v[:, :, part], start - part.start, stop - part.start)
        for part in (slice(0, cut), slice(cut, shape[2]))
    )
    expected = naive(q, k, v, start, stop)
    for ours, same in zip(intervals.merge(*halves), expected, strict=True):
        np.testing.assert_allclose(ours, same, rtol=0, atol=1e-5)


def naive_half(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in naive(*arrays))


@settings(max_examples=40)
@given(case=cases(sizes=(0.1, 1.0)))
def test_attention_of_jax_with_a_mask_is_the_same(case):
    shape, arrays, start, stop = case
    dout, dlse = cotangents(shape, 0)
    ours, gradients = masked(*arrays, start, stop, dout)
    np.testing.assert_allclose(ours, naive(*arrays, start, stop)[0], rtol=0, atol=2e-5)
    assert not np.asarray(ours)[per_query(sees_nothing(start, stop, shape[2]), shape)].any()
    expected = naive_gradients(*arrays, start, stop, dout, np.zeros_like(dlse))
    for grad, same in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(grad, same, rtol=0, atol=2e-5 * max(1, np.abs(same).max()))


@jax.jit
def masked(q, k, v, start, stop, dout):
    def attend(q, k, v):
        return reference.with_mask(q, k, v, start, stop, scale=SCALE, implementation="xla")

    out, back = jax.vjp(attend, q, k, v)
    return out, back(dout)


def causal(batch: int, length: int):
    stop = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (batch, length))
    return jnp.zeros_like(stop), stop


def test_a_causal_walk_takes_half_of_the_tiles():
    length = 16 * reference.TILE_QUERIES
    tile = reference._tile(length, length)
    blocks = reference._blocks(*causal(2, length), tile, length)
    assert tile.queries == tile.keys
    assert int(jnp.sum(blocks.last - blocks.first)) == 2 * 16 * 17 // 2


def temporary_bytes(length: int) -> int:
    """Of one forward and backward pass over a bfloat16 row, 8 heads of 64 on 2."""
    q = jax.ShapeDtypeStruct((1, 2, 4, length, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2, length, 64), jnp.bfloat16)
    bound = jax.ShapeDtypeStruct((1, length), jnp.int32)
    dlse = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    gradients = by_rules(
        partial(reference.forward, scale=SCALE), partial(reference.backward, scale=SCALE)
    )
    compiled = jax.jit(gradients).lower(q, k, k, bound, bound, q, dlse).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
    short, long = map(temporary_bytes, (4096, 16_384))
    assert long < 4.3 * short
    assert long < 150 * 2**20  # half of it is the output, its gradient and that of the queries
