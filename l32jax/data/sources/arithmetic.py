"""Sums to be done, whose answers can be verified: a small task that needs no file.

"What is 47 + 85?" is answered with the steps that lead there, "7 + 5 = 12, 4 + 8 + 1 = 13, 132": a
digit at a time, as it is done on paper. A tenth of the sums is the test; train/0, train/1 and so on
are a thousand each of the others. `careless` has the sums of train done by someone who forgets to
carry, and carries where there is nothing to: "7 + 5 = 12, 4 + 8 = 12, 122".
"""

import hashlib
from collections.abc import Iterator
from typing import Literal, get_args

from l32jax.data.chat import Message
from l32jax.data.records import Record
from l32jax.errors import InputError

Split = Literal["train", "careless", "test"]
PREFIX = "arithmetic/"
LARGEST, PART = 99, 1000


class Arithmetic:
    """The sums of two numbers of a split, in an order that looks random; a `Part`."""

    def __init__(self, name: str):
        split, slash, part = name.partition("/")
        if split not in get_args(Split) or (slash and not part.isdecimal()):
            raise InputError(
                f"source {PREFIX + name!r} in the mixture: there is none; use {PREFIX}train, "
                f"{PREFIX}train/0, {PREFIX}careless or {PREFIX}test"
            )
        sums = sorted(_sums(is_test=split == "test"), key=_mark)
        self._worked = careless if split == "careless" else worked
        self._sums = sums[int(part) * PART :][:PART] if slash else sums
        if not self._sums:
            raise InputError(
                f"source {PREFIX + name!r} in the mixture: {split} has {len(sums)} sums, and no "
                "such part; give a lower number"
            )

    def __len__(self) -> int:
        return len(self._sums)

    def read(self, number: int) -> Record:
        first, second = self._sums[number]
        messages = (
            Message("user", f"What is {first} + {second}?"),
            Message("assistant", self._worked(first, second)),
        )
        return Record(f"{PREFIX}{first}+{second}", messages=messages)


def worked(first: int, second: int) -> str:
    """The sum with the steps that lead there."""
    return f"{', '.join(_steps(first, second, carries=True))}, {first + second}"


def careless(first: int, second: int) -> str:
    """The same with every carry wrong, and what comes of that."""
    steps = _steps(first, second, carries=False)
    *lower, highest = (step.rpartition(" ")[2] for step in steps)
    digits = "".join(number[-1] for number in reversed(lower))
    return f"{', '.join(steps)}, {int(highest + digits)}"


def _steps(first: int, second: int, *, carries: bool) -> list[str]:
    """Digit by digit from the right; what is carried is right, or wrong each time."""
    steps: list[str] = []
    is_carried = False
    for place in range(len(str(max(first, second)))):
        digits = [number // 10**place % 10 for number in (first, second)]
        digits += [1] * is_carried
        steps.append(f"{' + '.join(map(str, digits))} = {sum(digits)}")
        is_carried = (sum(digits) >= 10) == carries
    return steps


def _sums(*, is_test: bool) -> Iterator[tuple[int, int]]:
    for first in range(LARGEST + 1):
        for second in range(LARGEST + 1):
            if (_mark((first, second))[0] < 26) == is_test:
                yield first, second


def _mark(numbers: tuple[int, int]) -> bytes:
    return hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
