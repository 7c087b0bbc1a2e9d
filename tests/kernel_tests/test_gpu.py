"""The GPU kernels, interpreted on the CPU, against a float64 definition in numpy.

Limits, relative to the largest element of what is compared (of scores: to 1 at least): 2e-5 in
float32, 2**-7 in bfloat16, where probabilities and their slopes are rounded before products.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.kernels import intervals
from l32jax.kernels.gpu import backend as gpu

SCALE = 0.3
LIMITS = {"float32": 2e-5, "bfloat16": 2**-7}
# Each shape is a compilation, intervals and values are free: (b, k, g, t, s, h).
SHAPES = [
    (2, 1, 1, 1, 1, 2),
    (1, 2, 3, 37, 50, 8),
    (2, 1, 4, 150, 150, 16),
    (1, 1, 1, 70, 300, 80),
]


@functools.partial(jax.jit, static_argnames="scale")
def forward(*arrays, scale=SCALE):
    return gpu.forward(*arrays, scale=scale, interpret=True)


@functools.partial(jax.jit, static_argnames="scale")
def backward(*arrays, scale=SCALE):
    return gpu.backward(*arrays, scale=scale, interpret=True)


def naive(q, k, v, start, stop, dout, dlse):
    """Attention, log-sum-exp and gradients by the textbook, all keys at once; float64."""
    q, k, v, dout = (np.asarray(array, np.float64) for array in (q, k, v, dout))
    key = np.arange(k.shape[2])
    visible = ((key >= start[..., None]) & (key < stop[..., None]))[:, None, None]
    scores = np.where(visible, np.einsum("bkgth,bksh->bkgts", q, k) * SCALE, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-1e30)
    with np.errstate(divide="ignore"):
        lse = top + np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))
    weights = np.where(visible, np.exp(scores - np.where(np.isfinite(lse), lse, 0)), 0)
    out = np.einsum("bkgts,bksh->bkgth", weights, v)
    delta = (dout * out).sum(axis=-1) - dlse
    slopes = weights * (np.einsum("bkgth,bksh->bkgts", dout, v) - delta[..., None]) * SCALE
    dq = np.einsum("bkgts,bksh->bkgth", slopes, k)
    dk = np.einsum("bkgts,bkgth->bksh", slopes, q)
    dv = np.einsum("bkgts,bkgth->bksh", weights, dout)
    return out, lse[..., 0], delta, dq, dk, dv


def drawn(shape, dtype, seed: int):
    """q, k, v, the cotangent of the result and that of the log-sum-exp."""
    b, k, g, t, s, h = shape
    random = np.random.default_rng(seed)
    sizes = [(b, k, g, t, h), (b, k, s, h), (b, k, s, h), (b, k, g, t, h)]
    arrays = [jnp.asarray(random.standard_normal(size), dtype) for size in sizes]
    return *arrays, random.standard_normal((b, k, g, t)).astype(np.float32)


def arbitrary(random, b, t, s):
    """Ends in any order, also before the first and beyond the last key."""
    return random.integers(-3, s + 4, (2, b, t))


def causal(random, b, t, s):
    del random
    row = np.broadcast_to(np.arange(t), (b, t))
    return np.zeros_like(row), row + 1


def packed(random, b, t, s):
    """Causal documents, one behind the other."""
    begins = random.random((b, t)) < 3 / t
    row = np.arange(t)
    return np.maximum.accumulate(np.where(begins, row, 0), axis=1), causal(random, b, t, s)[1]


def images(random, b, t, s):
    """Cross-attention: nothing before the first image, then all images since a document began."""
    num_images = 4
    borders = np.linspace(0, s, num_images + 1).astype(int)
    seen = np.sort(random.integers(0, num_images + 1, (b, t)), axis=1)
    begin = np.minimum(np.sort(random.integers(0, 2, (b, t)), axis=1), seen)
    return borders[begin], borders[seen]


def everything(random, b, t, s):
    del random
    return np.zeros((b, t), int), np.full((b, t), s)


def nothing(random, b, t, s):
    del random
    return np.full((b, t), s), np.zeros((b, t), int)


MASKS = [arbitrary, causal, packed, images, everything, nothing]


def assert_close(ours, theirs, limit: float, least: float = 0.0):
    __tracebackhide__ = True
    size = max(np.abs(theirs).max(initial=0), least)
    np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=0, atol=limit * size)


@settings(max_examples=48)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(sorted(LIMITS)),
    st.sampled_from(MASKS),
    st.integers(0, 2**31),
)
def test_values_and_gradients_equal_the_naive_definition(shape, dtype, mask, seed):
    q, k, v, dout, dlse = drawn(shape, dtype, seed)
    b, t, s = shape[0], shape[3], shape[4]
    start, stop = (np.int32(a) for a in mask(np.random.default_rng(seed), b, t, s))
    out, lse, delta, *gradients = naive(q, k, v, start, stop, dout, dlse)

    our_out, our_lse = forward(q, k, v, start, stop)
    assert (our_out.dtype, our_lse.dtype) == (dtype, "float32")
    assert_close(our_out, out, LIMITS[dtype])
    sees = np.isfinite(lse)
    assert (np.isneginf(our_lse) == ~sees).all()
    assert_close(our_lse[sees], lse[sees], LIMITS["float32"], least=1.0)

    ours = backward(q, k, v, start, stop, np.float32(lse), np.float32(delta), dout)
    for our, their in zip(ours, gradients, strict=True):
        assert our.dtype == np.float32
        assert_close(our, their, LIMITS[dtype])
    check_zeros(our_out, ours, start, stop, s)


def check_zeros(out, gradients, start, stop, num_keys):
    """Exactly, where a row sees nothing or nobody sees a key."""
    dq, dk, dv = gradients
    empty = np.minimum(stop, num_keys) <= np.maximum(start, 0)
    key = np.arange(num_keys)
    unseen = ~((key >= start[..., None]) & (key < stop[..., None])).any(axis=1)
    for array, absent in ((out, empty[:, None, None]), (dq, empty[:, None, None])):
        assert not (np.asarray(array, np.float32) * absent[..., None]).any()
    for array in (dk, dv):
        assert not (array * unseen[:, None, :, None]).any()


ROWS, KEYS = 150, 300


def far_apart():
    """Arrays, and bounds by which rows 128 on see the keys from 256 on and no row any other."""
    arrays = drawn((1, 1, 2, ROWS, KEYS, 16), "bfloat16", 0)
    start = np.full((1, ROWS), 256, np.int32)
    return arrays[:4], start, np.where(np.arange(ROWS) < 128, 256, KEYS).astype(np.int32)[None]


def test_blocks_of_keys_that_nobody_sees_are_not_touched():
    (q, k, v, dout), start, stop = far_apart()
    out, lse = forward(q, k, v, start, stop)
    before = backward(q, k, v, start, stop, lse, jnp.zeros_like(lse), dout)
    k, v = (array.at[:, :, :256].set(jnp.nan) for array in (k, v))
    np.testing.assert_array_equal(forward(q, k, v, start, stop)[0], out)
    dq, _, _ = backward(q, k, v, start, stop, lse, jnp.zeros_like(lse), dout)
    np.testing.assert_array_equal(dq, before[0])


def test_blocks_of_queries_that_see_no_key_of_a_block_are_not_touched():
    (q, k, v, dout), start, stop = far_apart()
    _, lse = forward(q, k, v, start, stop)
    _, *before = backward(q, k, v, start, stop, lse, jnp.zeros_like(lse), dout)
    q, dout = (array.at[:, :, :, :128].set(jnp.nan) for array in (q, dout))
    _, *after = backward(q, k, v, start, stop, lse, jnp.zeros_like(lse), dout)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_shards_of_the_keys_make_the_whole():
    """As a ring does it: results merge by their log-sum-exp, gradients use that of the whole."""
    q, k, v, dout, dlse = drawn((1, 2, 3, 37, 50, 8), "float32", 1)
    start, stop = (jnp.int32(a) for a in packed(np.random.default_rng(1), 1, 37, 50))
    out, lse, delta, dq, dk, dv = naive(q, k, v, *map(np.asarray, (start, stop)), dout, dlse)

    shards = [(k[:, :, i : i + 25], v[:, :, i : i + 25]) for i in (0, 25)]
    bounds = [intervals.shift(start, stop, i, 25) for i in (0, 25)]
    parts = [forward(q, *shard, *bound) for shard, bound in zip(shards, bounds, strict=True)]
    merged, merged_lse = intervals.merge(*parts)
    assert_close(merged, out, LIMITS["float32"])
    assert_close(merged_lse, lse, LIMITS["float32"], least=1.0)

    left, right = (
        backward(q, *shard, *bound, merged_lse, jnp.float32(delta), dout)
        for shard, bound in zip(shards, bounds, strict=True)
    )
    assert_close(left[0] + right[0], dq, LIMITS["float32"])
    for i, theirs in ((1, dk), (2, dv)):
        assert_close(np.concatenate([left[i], right[i]], axis=2), theirs, LIMITS["float32"])


def test_heads_that_no_tile_serves_are_refused():
    q, k, v, *_ = drawn((1, 1, 1, 4, 4, 130), "bfloat16", 0)
    bound = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match="bfloat16 heads of 130.*up to 128"):
        forward(q, k, v, bound, bound)
