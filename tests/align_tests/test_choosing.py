"""The best answer is learned from, and held against the worst."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.align.choosing import Scored, choose


def answers(*scores, **others) -> list[Scored]:
    return [
        Scored(number, f"answer {number}", 5, True, *pair, **others)
        for number, pair in enumerate(scores)
    ]


def numbers(scored) -> tuple:
    best, pair = choose(scored)
    return (best and best.number, pair and (pair.chosen.number, pair.rejected.number, pair.margin))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([(0.0,), (1.0,), (0.5,)], (1, (1, 0, 1.0))),
        ([(0.5,), (1.0,)], (1, (1, 0, 0.5))),
        ([(0.0,), (0.0,)], (None, None)),
        ([(1.0,), (1.0,)], (0, None)),
        ([(1.0,)], (0, None)),
        ([], (None, None)),
        ([(None, -3.0), (None, -1.0), (None, -2.0)], (1, (1, 0, 2.0))),
        ([(1.0, 0.25), (1.0, 2.0), (1.0, 1.0)], (1, (1, 0, 1.75))),
        ([(1.0, -5.0), (0.0,), (1.0, -4.0)], (2, (2, 1, 1.0))),
    ],
    ids=str,
)
def test_the_verifier_decides_and_the_reward_among_equals(scores, expected):
    assert numbers(answers(*scores)) == expected


def test_answers_that_are_cut_off_or_empty_do_not_count():
    cut = Scored(0, "a", 5, False, 1.0)
    empty = Scored(1, " \n", 5, True, 1.0)
    assert numbers([cut, empty]) == (None, None)
    assert numbers([cut, empty, Scored(2, "b", 5, True, 0.5)]) == (2, None)


def test_of_equal_texts_the_first_counts():
    same = [Scored(n, f"{' ' * n}a", 5, True, None, float(n)) for n in (2, 0, 1)]
    assert numbers(same) == (0, None)


REWARDS = st.none() | st.floats(-9, 9, width=16)
VERIFIED = st.tuples(st.sampled_from([0.0, 0.5, 1.0]), REWARDS)
ONLY_REWARDED = st.tuples(st.none(), REWARDS)


@given(st.lists(VERIFIED, max_size=6) | st.lists(ONLY_REWARDED, max_size=6), st.randoms())
def test_the_order_in_which_answers_came_does_not_matter(scores, random):
    scored = answers(*scores)
    shuffled = random.sample(scored, len(scored))
    assert choose(shuffled) == choose(scored)
    best, pair = choose(scored)
    assert (best is None) == all(answer.verifier == 0 for answer in scored)
    if pair is not None:
        assert pair.chosen == best and pair.margin > 0
