"""How many questions about charts and documents a model answers right, by their kind."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from rich.table import Table

from l32jax.data.charts.baselines import majority_answers
from l32jax.data.charts.draw import draw
from l32jax.data.charts.questions import final_answer, questions
from l32jax.data.charts.scenes import TINY, Charts, Difficulty, Question, Split
from l32jax.evaluate.asking import replies
from l32jax.generate.model import Model

ALL = "all"
REPLY = 48  # tokens at most: a description of a small picture, what decides, and the answer


@dataclasses.dataclass(frozen=True)
class Score:
    """Shares of right answers, by kind of question and for ALL together."""

    split: Split
    model: Mapping[str, float]
    blind: Mapping[str, float]
    majority: Mapping[str, float]


def accuracy(
    model: Model,
    split: Split,
    *,
    pictures: int,
    difficulty: Difficulty = TINY,
    max_new_tokens: int = REPLY,
) -> Score:
    """Of the questions about the first `pictures` of a split, beside what can be had blind.

    blind: each question's own commonest answer. majority: the commonest of all.
    """
    asked, images = [], []
    for scene in itertools.islice(Charts(split, difficulty), pictures):
        image = draw(scene)
        asked += questions(scene)
        images += [image] * (len(asked) - len(images))
    pairs = [(question.text, image) for question, image in zip(asked, images, strict=True)]
    told = replies(model, pairs, max_new_tokens=max_new_tokens)
    guesses = majority_answers(difficulty)
    return Score(
        split=split,
        model=shares_right(asked, list(map(final_answer, told))),
        blind=shares_right(asked, [guesses.get(question.text, "") for question in asked]),
        majority=shares_right(asked, [guesses[""]] * len(asked)),
    )


def shares_right(asked: Sequence[Question], told: Sequence[str]) -> dict[str, float]:
    """The share of right answers by kind of question, and under ALL."""
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for question, answer in zip(asked, told, strict=True):
        for kind in (question.kind, ALL):
            right[kind].append(answer == question.answer)
    return {kind: sum(each) / len(each) for kind, each in sorted(right.items())}


def table(scores: Sequence[Score]) -> Table:
    """Kinds of questions as rows, splits as columns, each beside what is right blind."""
    made = Table(title="questions answered right")
    made.add_column("kind")
    for score in scores:
        made.add_column(score.split, justify="right")
        made.add_column("blind", justify="right")
    kinds = sorted(set().union(*(score.model for score in scores)) - {ALL})
    for kind in [*kinds, ALL]:
        shares = [share for score in scores for share in (score.model, score.blind)]
        cells = [f"{share[kind]:.1%}" if kind in share else "" for share in shares]
        made.add_row(kind, *cells, end_section=kind == kinds[-1])
    return made
