"""Which of the answers to a prompt is learned from, and which two are held against each other."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Scored:
    """An answer, and what was found out about it.

    verifier: how right it is, 0 to 1. reward: of the reward model, of answers that are not wrong.
    failure: why the verifier could tell nothing.
    """

    number: int
    text: str
    num_tokens: int
    finished: bool
    verifier: float | None = None
    reward: float | None = None
    failure: str | None = None

    @property
    def is_right(self) -> bool:
        return self.finished and (self.verifier is None or self.verifier > 0)

    @property
    def rank(self) -> tuple[float, float]:
        """The verifier decides, then the reward; what was not asked for is alike for all."""
        reward = -math.inf if self.reward is None else self.reward
        return (0.0 if self.verifier is None else self.verifier), reward


class Pair(NamedTuple):
    chosen: Scored
    rejected: Scored

    @property
    def margin(self) -> float:
        """The difference of the first score in which they differ."""
        better, worse = self.chosen.rank, self.rejected.rank
        return next(a - b for a, b in zip(better, worse, strict=True) if a != b)


class Choice(NamedTuple):
    """None where no answer is good enough, or no two differ in their scores."""

    best: Scored | None
    pair: Pair | None


def choose(answers: Sequence[Scored]) -> Choice:
    """Of equal texts the first counts; answers that were cut off, or are empty, do not."""
    by_text: dict[str, Scored] = {}
    for answer in sorted(answers, key=lambda answer: answer.number):
        if answer.finished and answer.text.strip():
            by_text.setdefault(answer.text.strip(), answer)
    ranked = sorted(by_text.values(), key=lambda answer: answer.rank, reverse=True)  # stable
    if not ranked or not ranked[0].is_right:
        return Choice(None, None)
    best, worst = ranked[0], ranked[-1]
    return Choice(best, Pair(best, worst) if best.rank > worst.rank else None)
