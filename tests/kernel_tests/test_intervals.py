"""Intervals of keys, held against the keys themselves."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.kernels import intervals


@st.composite
def cases(draw):
    """Any bounds at all, and a number of keys: few shapes, since each of them is traced anew."""
    b, t, num_keys = draw(st.sampled_from([(1, 1, 1), (1, 5, 7), (2, 7, 12), (3, 4, 16)]))
    bounds = st.lists(st.integers(-3, num_keys + 3), min_size=b * t, max_size=b * t)
    start, stop = (np.reshape(draw(bounds), (b, t)).astype(np.int32) for _ in range(2))
    return start, stop, num_keys


BLOCKS = st.sampled_from([1, 3, 8])
hulls, active_blocks, whole_blocks = (
    jax.jit(function, static_argnames=("block", "num_keys"))
    for function in (intervals.hulls, intervals.active, intervals.whole)
)


def visible(start, stop, num_keys):
    """[b t s], from the definition."""
    key = np.arange(num_keys)
    return (key >= np.asarray(start)[..., None]) & (key < np.asarray(stop)[..., None])


def in_blocks(x, dim: int, block: int) -> list[np.ndarray]:
    return np.split(x, range(block, x.shape[dim], block), axis=dim)


def in_tiles(seen, block: int, key_block: int) -> list[list[np.ndarray]]:
    """[block][key block] of [b t s]; the last ones hold what is left."""
    return [in_blocks(rows, 2, key_block) for rows in in_blocks(seen, 1, block)]


@settings(max_examples=100)
@given(cases())
def test_clipped_intervals_see_the_same_and_stay_inside(case):
    start, stop, num_keys = case
    first, last = map(np.asarray, intervals.clip(jnp.asarray(start), jnp.asarray(stop), num_keys))
    assert (visible(first, last, num_keys) == visible(start, stop, num_keys)).all()
    assert ((first >= 0) & (first <= last) & (last <= num_keys)).all()
    assert not first[first == last].any()


@settings(max_examples=100)
@given(cases(), st.data())
def test_shards_see_their_part(case, data):
    start, stop, num_keys = case
    begin, end = sorted(data.draw(st.integers(0, num_keys)) for _ in range(2))
    bounds = jnp.asarray(start), jnp.asarray(stop)
    shard = intervals.shift(*bounds, begin, end - begin)
    part = visible(start, stop, num_keys)[:, :, begin:end]
    assert (visible(*shard, end - begin) == part).all()


@settings(max_examples=100)
@given(cases(), BLOCKS)
def test_hulls_hold_every_visible_key_and_no_more(case, block):
    start, stop, num_keys = case
    seen = jax.device_get(hulls(start, stop, block=block, num_keys=num_keys))
    for index, rows in enumerate(in_blocks(visible(start, stop, num_keys), 1, block)):
        for b, some in enumerate(rows.any(axis=1)):
            keys = np.flatnonzero(some)
            tight = (keys[0], keys[-1] + 1) if keys.size else (0, 0)
            assert (seen.first[b, index], seen.last[b, index]) == tight


@settings(max_examples=100)
@given(cases(), BLOCKS)
def test_every_row_of_a_full_block_sees_what_every_row_is_said_to_see(case, block):
    start, stop, num_keys = case
    seen = jax.device_get(hulls(start, stop, block=block, num_keys=num_keys))
    blocks = in_blocks(visible(start, stop, num_keys), 1, block)
    for index, rows in enumerate(blocks):
        inside = visible(seen.every_first[:, [index]], seen.every_last[:, [index]], num_keys)
        full = rows.shape[1] == block  # else it is filled up with rows that see nothing
        assert (inside[:, 0] == (rows.all(axis=1) & full)).all()


@settings(max_examples=100)
@given(cases(), BLOCKS, BLOCKS)
def test_blocks_left_out_hold_no_visible_key(case, block, key_block):
    start, stop, num_keys = case
    seen = hulls(start, stop, block=block, num_keys=num_keys)
    active = np.asarray(active_blocks(seen, block=key_block, num_keys=num_keys))
    tiles = in_tiles(visible(start, stop, num_keys), block, key_block)
    assert active.shape[1:] == (len(tiles), len(tiles[0]))
    for index, row in enumerate(tiles):
        for key_index, tile in enumerate(row):
            assert (active[:, index, key_index] >= tile.any(axis=(1, 2))).all()


@settings(max_examples=100)
@given(cases(), BLOCKS, BLOCKS)
def test_whole_blocks_are_those_without_an_unseen_key(case, block, key_block):
    start, stop, num_keys = case
    seen = hulls(start, stop, block=block, num_keys=num_keys)
    whole = np.asarray(whole_blocks(seen, block=key_block, num_keys=num_keys))
    for index, row in enumerate(in_tiles(visible(start, stop, num_keys), block, key_block)):
        for key_index, tile in enumerate(row):
            full = tile.shape[1:] == (block, key_block)
            assert (whole[:, index, key_index] == (tile.all(axis=(1, 2)) & full)).all()


def partial_attention(scores, values):
    """Float64 softmax over the finite scores, [t s] and [s h]: (out, log-sum-exp)."""
    weights = np.exp(scores)
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        return weights @ values / np.where(total > 0, total, 1)[:, None], np.log(total)


def merged(scores, values, parts):
    pieces = [partial_attention(scores[:, part], values[part]) for part in parts]
    return intervals.merge(*(tuple(jnp.asarray(x, jnp.float32) for x in piece) for piece in pieces))


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(0, 9), st.floats(0, 1), st.sampled_from([1.0, 80.0]))
def test_merging_two_sets_of_keys_is_attention_over_both(seed, cut, unseen, size):
    random = np.random.default_rng(seed)
    scores = size * random.uniform(-1, 1, (6, 9))
    scores[random.random((6, 9)) < unseen] = -np.inf
    values = random.standard_normal((9, 3))
    out, lse = merged(scores, values, (slice(0, cut), slice(cut, 9)))
    whole_out, whole_lse = partial_attention(scores, values)
    np.testing.assert_allclose(out, whole_out, rtol=0, atol=5e-5)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-6, atol=1e-5)
    assert not np.asarray(out)[np.isneginf(whole_lse)].any()


def test_merging_with_nothing_changes_nothing():
    out = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    lse = jnp.asarray([0.0, -300.0, 300.0, -jnp.inf])
    out = out.at[3].set(0)
    nothing = jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)
    for pair in ((out, lse), nothing), (nothing, (out, lse)):
        merged_out, merged_lse = intervals.merge(*pair)
        np.testing.assert_array_equal(merged_out, out)
        np.testing.assert_array_equal(merged_lse, lse)
