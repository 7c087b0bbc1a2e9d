"""Which answers are right, and that no answer or record makes a verifier do more than say so."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.align.numbers import boxed, last_number
from l32jax.align.prompts import Truth
from l32jax.align.verifiers import (
    VERIFIERS,
    code_of,
    letter,
    unverifiable,
    verdict,
    verifier,
)
from l32jax.errors import InputError

# Numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7 apples.", 7),
        ("#### 1,234.50", Fraction("1234.5")),
        ("it is -3.", -3),
        ("10-4", 4),
        ("\N{MINUS SIGN}7", -7),
        ("-$5", -5),
        ("half, .5", Fraction(1, 2)),
        ("3/4 of it", Fraction(3, 4)),
        ("so -\\frac{1}{2}$", Fraction(-1, 2)),
        ("\\boxed{\\dfrac{3}{4}}, not 5", Fraction(3, 4)),
        ("\\boxed{1} or \\boxed{x = {2}}", 2),
        ("1{,}000", 1000),
        ("1,000,00", 0),
        ("(1, 2)", 2),
        ("1.5e3", 1500),
        ("2e-3", Fraction(2, 1000)),
        ("50%", 50),
        ("3/0", None),
        ("none", None),
        ("", None),
        ("1" * 1000, None),
        ("1e999", None),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == value


@given(st.fractions(max_denominator=10**6), st.text("abc xyz.,()= ", max_size=20))
def test_every_spelling_of_a_fraction_is_worth_it(value, before):
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    spellings = [f"{value}", f"{sign}\\frac{{{top}}}{{{bottom}}}", f"\\boxed{{{value}}} or so"]
    for spelling in spellings:
        assert last_number(f"{before} = {spelling}") == value


@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=3), st.sampled_from(["", ",", "$"]))
def test_every_spelling_of_a_decimal_is_worth_it(value, style):
    text = f"{value:,}" if style == "," else f"{value}"
    text = text.replace("-", "-$") if style == "$" else text
    assert last_number(f"It costs {text} today.") == Fraction(value)


@given(st.text("0123456789,./-+eE\\{}$ frac boxed", max_size=60) | st.text())
def test_whatever_the_text_a_number_comes_out_or_none(text):
    assert isinstance(last_number(text), Fraction | None)


@pytest.mark.parametrize(
    "text",
    [
        "1,111" * 100_000,
        "\\frac{" + " " * 200_000,
        "answer " * 100_000,
        "```\n" * 100_000,
        "```" + "a" * 400_000,
    ],
)
def test_long_answers_take_no_longer(text):
    for check in VERIFIERS.values():
        verdict(check, text, Truth("7", {"tests": "assert False", "calls": [{"f": {}}]}))


def test_what_is_boxed_last_counts_if_the_box_is_closed():
    assert boxed("\\boxed{a{b}c} \\boxed{d}") == "d"
    assert boxed("\\boxed{a") is None and boxed("a") is None


# Letters and texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" (b) ", "B"),
        ("C. Paris", "C"),
        ("The answer is C because (B) is wrong", "C"),
        ("Answer: **E**", "E"),
        ("First A) no, then D) yes", "D"),
        ("A cat sat; B is it", "B"),
        ("I choose A", "A"),
        ("\\boxed{D} and (A)", "D"),
        ("I am sure", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_settles_on(text, expected):
    assert letter(text) == expected


@pytest.mark.parametrize(
    ("name", "answer", "reference", "score"),
    [
        ("exact", " A  Red\nhouse. ", "a red house", 1),
        ("exact", "a red mouse", "a red house", 0),
        ("number", "That makes 1,000.", "... #### 1000", 1),
        ("number", "That makes 100.", "... #### 1000", 0),
        ("number", "no idea", "1000", 0),
        ("choice", "I choose (C).", "C", 1),
        ("choice", "I choose (D).", "C", 0),
        ("choice", "no idea", "C", 0),
    ],
)
def test_answers_are_held_against_the_reference(name, answer, reference, score):
    assert verdict(verifier(name), answer, Truth(reference)) == (score, None)


@pytest.mark.parametrize("name", VERIFIERS)
def test_without_a_truth_nothing_can_be_verified(name):
    assert unverifiable(verifier(name), Truth())


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("number", Truth("none")),
        ("choice", Truth("red")),
        ("python", Truth("1", {"tests": 5})),
        ("tool_calls", Truth("red", {"calls": "f"})),
        ("tool_calls", Truth("[f(a=1)]", {"functions": [{}]})),
    ],
)
def test_a_truth_of_another_kind_is_told(name, truth):
    assert unverifiable(verifier(name), truth)


# Code


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("So:\n```python\na = 1\n```\nand\n```\nb = 2\n```\n", "a = 1\n\nb = 2\n"),
        ("```bash\nrm -r /\n```\n```py\na = 1\n```", "a = 1\n"),
        ("<|python_tag|>a = 1", "a = 1"),
        ("a = 1", "a = 1"),
        ("```bash\nls\n```", ""),
    ],
)
def test_the_code_of_an_answer(answer, code):
    assert code_of(answer) == code


def test_code_passes_the_tests_of_its_record():
    truth = Truth(None, {"tests": "assert double(4) == 8"})
    right = "```python\ndef double(x):\n    return 2 * x\n```"
    assert verdict(verifier("python"), right, truth) == (1, None)
    assert verdict(verifier("python"), right.replace("2", "3"), truth) == (0, None)


# Of one's own


def strange(value):
    def check(answer, truth):
        if isinstance(value, Exception):
            raise value
        return value

    return check


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (ValueError("a\nb"), "ValueError: a"),
        (math.nan, "nan is not from 0 to 1"),
        (1.5, "1.5 is not from 0 to 1"),
        (-1, "-1.0 is not from 0 to 1"),
        ("red", "could not convert"),
        (None, "TypeError"),
    ],
)
def test_a_verifier_that_fails_gives_nothing_and_is_named(value, why):
    score, failure = verdict(strange(value), "a", Truth("a"))
    assert score == 0 and why in failure


def test_only_what_is_said_on_purpose_makes_a_truth_unusable():
    assert unverifiable(strange(InputError("no tests")), Truth()) == "no tests"
    assert unverifiable(strange(ValueError("oh")), Truth()) is None


def test_a_function_of_a_module_is_a_verifier():
    assert verifier("math:hypot") is math.hypot


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("exakt", "use exact, number"),
        ("no_such_module:f", "No module named"),
        ("math:no_such", "no attribute"),
        ("math:pi", "no function"),
        (":f", "Empty module name"),
    ],
)
def test_what_is_no_verifier_is_told(name, why):
    with pytest.raises(InputError, match=why):
        verifier(name)
