"""Sums that are worked right, or carelessly, and who may see which."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.align.prompts import prompt_of
from l32jax.align.verifiers import verdict, verifier
from l32jax.data.sources.arithmetic import careless, worked
from l32jax.data.sources.open import open_records
from l32jax.errors import InputError

NUMBERS = st.integers(0, 99)


def steps_of(answer: str) -> list[tuple[list[int], int]]:
    *steps, _ = answer.split(", ")
    sides = (step.split(" = ") for step in steps)
    return [([int(digit) for digit in left.split(" + ")], int(right)) for left, right in sides]


@given(NUMBERS, NUMBERS)
def test_steps_lead_to_the_sum(first, second):
    answer, carried = worked(first, second), 0
    for place, (digits, total) in enumerate(steps_of(answer)):
        expected = [number // 10**place % 10 for number in (first, second)]
        assert digits == [*expected, *[1] * carried] and total == sum(digits)
        carried = total // 10
    assert answer.endswith(f", {first + second}")


@given(NUMBERS, NUMBERS)
def test_carelessness_is_about_carrying_alone(first, second):
    answer = careless(first, second)
    right, wrong = steps_of(worked(first, second)), steps_of(answer)
    assert all(sum(digits) == total for digits, total in wrong) and wrong[0] == right[0]
    for (digits, _), (others, _) in zip(right[1:], wrong[1:], strict=True):
        assert digits[:2] == others[:2] and len(digits) != len(others)
    carried = first % 10 + second % 10 >= 10
    off = 0 if max(first, second) < 10 else -10 if carried else 10
    assert answer.endswith(f", {first + second + off}")


def test_all_sums_are_there_and_those_of_the_test_are_not_trained_on():
    by_split = {
        split: [record.messages[0].content for record in open_records(f"arithmetic/{split}")]
        for split in ("train", "careless", "test")
    }
    assert by_split["train"] == by_split["careless"]
    assert len(by_split["train"]) + len(by_split["test"]) == 10_000
    assert not set(by_split["train"]) & set(by_split["test"])
    parts = [open_records(f"arithmetic/train/{part}") for part in range(10)]
    asked = [record.messages[0].content for part in parts for record in part]
    assert asked == by_split["train"] and len(parts[0]) == 1000


def test_the_verifier_knows_them_apart():
    check = verifier("number")
    for name, score in (("train", 1.0), ("careless", 0.0)):
        truths = [prompt_of(record).truth for record in open_records("arithmetic/train/0")]
        told = [record.messages[1].content for record in open_records(f"arithmetic/{name}")]
        scores = [verdict(check, *each).score for each in zip(told, truths, strict=False)]
        assert sum(each == score for each in scores) >= 0.98 * len(scores)  # one digit: all right


@pytest.mark.parametrize("name", ["valid", "train/x", "train/99", "", "test/-1"])
def test_what_is_not_there_is_told(name):
    with pytest.raises(InputError, match="arithmetic/"):
        open_records(f"arithmetic/{name}")
