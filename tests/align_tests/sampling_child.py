"""`l32jax sample` with a verifier that takes its time, to be stopped while it is at work."""

import sys
import time

from l32jax.__main__ import main


def letters(answer, truth) -> float:
    """The share of letters: random answers differ in it."""
    return sum(letter.isalpha() for letter in answer) / max(len(answer), 1)


def digits(answer, truth) -> float:
    return sum(letter.isdigit() for letter in answer) / max(len(answer), 1)


def slowly(answer, truth) -> float:
    time.sleep(0.05)
    return letters(answer, truth)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
