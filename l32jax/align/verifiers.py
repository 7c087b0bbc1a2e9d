"""What is right about an answer, in 0 to 1: functions by name, or of whoever brings one."""

import importlib
import math
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple, cast

from l32jax.align.calls import tool_calls
from l32jax.align.numbers import MAX_CHARS, boxed, last_number
from l32jax.align.programs import passes
from l32jax.align.prompts import Truth
from l32jax.data.tool_calls import PYTHON_TAG
from l32jax.errors import InputError, one_line

# From an answer and what is true to how right it is, 0 to 1. An InputError says that nothing can be
# told by this truth. It is called in several threads.
Verifier = Callable[[str, Truth], float]

CODE_BLOCK = re.compile(r"^```(\w*+)[^\n]*+\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Where answers to questions with choices name their letter, the surest place first.
LETTERS = tuple(
    map(
        re.compile,
        (
            r"^[(*\s]*([A-Za-z])[).:*\s]*$",
            r"(?i:answer|choose)(?i:\sis)?\s?:?\s?[(*\"']*([A-Z])(?![\w'])",
            r"\(([A-Z])\)",
            r"(?<!\w)([A-Z])[).:](?!\w)",
            r"(?<![\w'])([A-Z])(?![\w'])(?<![AI](?=\s[a-z]))",  # no article, no pronoun
        ),
    )
)


def exact(answer: str, truth: Truth) -> float:
    """1 if the texts are equal but for case, spaces, width of letters and the last full stop."""
    return float(_plain(answer) == _plain(_reference(truth)))


def number(answer: str, truth: Truth) -> float:
    """1 if the last number of the answer is the last of the reference: see `last_number`."""
    expected = last_number(_reference(truth))
    if expected is None:
        raise InputError("reference answer: it has no number; use another verifier")
    return float(last_number(answer) == expected)


def choice(answer: str, truth: Truth) -> float:
    """1 if the answer settles on the letter that the reference has."""
    expected = letter(_reference(truth))
    if expected is None:
        raise InputError("reference answer: it names no choice by a letter; use another verifier")
    return float(letter(answer) == expected)


def python(answer: str, truth: Truth) -> float:
    """1 if the code of the answer passes the `tests` of the record's `check`: see `programs`."""
    tests = truth.check.get("tests")
    if not isinstance(tests, str) or not tests.strip():
        raise InputError('tests of a record: none; give {"tests": "assert f(1) == 2"} as `check`')
    program = code_of(answer)
    return float(bool(program.strip()) and passes(program, tests))


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "number": number,
    "choice": choice,
    "python": python,
    "tool_calls": tool_calls,
}


def verifier(name: str) -> Verifier:
    """One of VERIFIERS, or the function that package.module:function names."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(
            f"verifier {name!r}: there is none; use {', '.join(VERIFIERS)}, or module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"verifier {name!r}: {one_line(error)}; put the module where Python finds it"
        ) from None
    if not callable(found):
        raise InputError(f"verifier {name!r}: it is no function; name one")
    return cast(Verifier, found)


class Verdict(NamedTuple):
    """How right an answer is, and why nothing could be told, if so."""

    score: float
    failure: str | None = None


def verdict(check: Verifier, answer: str, truth: Truth) -> Verdict:
    """Of a verifier that fails the score is 0."""
    try:
        score = float(check(answer, truth))
    except Exception as error:  # noqa: BLE001  (others' code)
        return Verdict(0.0, f"{type(error).__name__}: {one_line(error)}")
    if not (math.isfinite(score) and 0 <= score <= 1):
        return Verdict(0.0, f"the score {score} is not from 0 to 1")
    return Verdict(score)


def unverifiable(check: Verifier, truth: Truth) -> str | None:
    """Why nothing can be told by this truth, if so: what is said of an empty answer."""
    try:
        check("", truth)
    except InputError as error:
        return one_line(error)
    except Exception:  # noqa: BLE001  (counted when there is an answer)
        pass
    return None


def letter(text: str) -> str | None:
    """The choice that a text settles on; the last one that it names where it is surest."""
    text = (boxed(text) or text)[-MAX_CHARS:]
    for place in LETTERS:
        if found := place.findall(text):
            return found[-1].upper()
    return None


def code_of(answer: str) -> str:
    """The Python of an answer: its code blocks one after the other, or all of it without any."""
    blocks = CODE_BLOCK.findall(answer)
    code = [text for language, text in blocks if language.lower() in ("", "python", "py")]
    return "\n".join(code) if blocks else answer.strip().removeprefix(PYTHON_TAG)


def _reference(truth: Truth) -> str:
    if truth.answer is None:
        raise InputError("reference answer: there is none; end the dialog with one")
    return truth.answer


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).removesuffix(".").rstrip()
