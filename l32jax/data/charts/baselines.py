"""How well one does without seeing the pictures: estimated from what the generator makes."""

import collections
import itertools

from l32jax.data.charts.questions import questions
from l32jax.data.charts.scenes import Charts, Difficulty, Question

COUNTED = 20_000  # training pictures, as facts: they are not drawn


def asked(scenes: Charts, count: int) -> list[Question]:
    """The questions about the first `count` pictures."""
    return [question for scene in itertools.islice(scenes, count) for question in questions(scene)]


def majority_answers(difficulty: Difficulty) -> dict[str, str]:
    """For each question text its commonest answer in training, and "" for all of them together.

    A model that does no better than these answers has not looked at the picture.
    """
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for question in asked(Charts("train", difficulty), COUNTED):
        counts[question.text][question.answer] += 1
        counts[""][question.answer] += 1
    return {text: counter.most_common(1)[0][0] for text, counter in counts.items()}
