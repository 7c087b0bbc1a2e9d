"""Which tokens the truncation rules keep, and what a draw depends on."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from l32jax.config import SamplingConfig
from l32jax.errors import InputError
from l32jax.generate.sampling import require_valid, sample, truncate

VOCAB = 12
truncated = jax.jit(truncate)
sampled = jax.jit(sample)


def kept(scores, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    ours = truncated(jnp.float32(scores), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))
    ours = np.asarray(ours)
    stays = np.isfinite(ours)
    np.testing.assert_array_equal(ours[stays], np.float32(scores)[stays])
    return stays


def oracle(row, top_k, top_p, min_p) -> set[int]:
    """One token after the other, likeliest first, in float64."""
    probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    order = sorted(range(len(row)), key=lambda token: -row[token])
    chosen, before = set(), 0.0
    for rank, token in enumerate(order):
        allowed = (not top_k or rank < top_k) and (top_p == 1 or before < top_p)
        allowed = allowed and probability[token] >= min_p * probability[order[0]]
        if rank == 0 or allowed:
            chosen.add(token)
        before += probability[token]
    return chosen


# Distinct scores, so that the sets are unique; ties have their own test.
ROWS = st.lists(
    st.lists(st.integers(-300, 300), min_size=VOCAB, max_size=VOCAB, unique=True),
    min_size=3,
    max_size=3,
).map(lambda rows: np.array(rows) / 50)


@settings(max_examples=300)
@given(
    ROWS,
    st.integers(0, VOCAB + 1),
    st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
)
def test_kept_tokens_are_those_of_the_definition(scores, top_k, top_p, min_p):
    for row in scores:  # float32 may decide otherwise where the definition is at its edge
        probability = np.exp(row) / np.exp(row).sum()
        cumulated = np.cumsum(np.sort(probability)[::-1])
        assume(np.abs(cumulated - top_p).min() > 1e-5 or top_p == 1)
        assume(not min_p or np.abs(probability / probability.max() - min_p).min() > 1e-5)
    ours = kept(scores, top_k, top_p, min_p)
    for row, stays in zip(scores, ours, strict=True):
        assert set(np.flatnonzero(stays).tolist()) == oracle(row, top_k, top_p, min_p)


@settings(max_examples=50)
@given(ROWS)
def test_neutral_settings_keep_everything(scores):
    assert kept(scores).all()


def test_ties_with_the_last_token_kept_stay():
    assert kept([[1.0, 2.0, 1.0, 0.0]], top_k=2).tolist() == [[True, True, True, False]]


def test_every_rule_leaves_the_likeliest_token():
    assert kept([[0.0, 5.0, 1.0]], top_k=1, top_p=1e-6, min_p=1.0).tolist() == [
        [False, True, False]
    ]


def draw(scores, seeds, *, temperature=1.0, top_k=0) -> np.ndarray:
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    rules = jnp.int32(top_k), jnp.float32(1), jnp.float32(0)
    return np.asarray(sampled(jnp.float32(scores), keys, jnp.float32(temperature), *rules))


@settings(max_examples=30)
@given(ROWS, st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3))
def test_a_draw_depends_on_its_own_row_and_seed_alone(scores, seeds):
    first = draw(scores, seeds)
    np.testing.assert_array_equal(draw(scores, seeds), first)
    others = np.concatenate([scores[:1], scores[1:] + np.arange(VOCAB)])
    assert draw(others, [seeds[0], 1, 2])[0] == first[0]
    order = [2, 0, 1]
    np.testing.assert_array_equal(draw(scores[order], [seeds[i] for i in order]), first[order])


def test_draws_follow_the_probabilities():
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    many = 20_000
    for temperature in (1.0, 0.5):
        expected = probability ** (1 / temperature) / (probability ** (1 / temperature)).sum()
        scores = np.tile(np.log(probability), (many, 1))
        tokens = draw(scores, np.arange(many), temperature=temperature)
        found = np.bincount(tokens, minlength=4) / many
        assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / many)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-60])
def test_tiny_temperatures_are_greedy(temperature):
    assert (
        draw([[1.0, 90.0, 89.0]] * 50, np.arange(50), temperature=temperature).tolist() == [1] * 50
    )


def test_truncated_tokens_are_never_drawn():
    scores = np.tile([0.0, 0.1, 0.2, 0.3], (2000, 1))
    assert set(draw(scores, np.arange(2000), top_k=2).tolist()) == {2, 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.5}, "min_p=-0.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        require_valid(SamplingConfig(**settings))
