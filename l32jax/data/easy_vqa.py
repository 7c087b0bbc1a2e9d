"""easy-VQA: questions about one coloured shape on a 64 x 64 picture (PyPI package `easy-vqa`).

Every picture comes with 2 to 21 questions, one record a picture, so that it is encoded once for
all of them. Two baselines that see no picture: `majority_accuracy` and `blind_accuracy`.
"""

import collections
from collections.abc import Sequence
from typing import Literal, NamedTuple

from l32jax.errors import InputError

Split = Literal["train", "test"]


class Question(NamedTuple):
    text: str
    answer: str


class Scene(NamedTuple):
    """A picture's PNG file, and what is asked about it."""

    image: str
    questions: tuple[Question, ...]


class EasyVqa(Sequence[Scene]):
    """The pictures of a split as a random-access source of records."""

    def __init__(self, split: Split):
        package = _package()
        read_questions = getattr(package, f"get_{split}_questions")
        asked = collections.defaultdict(list)
        for text, answer, image in zip(*read_questions(), strict=True):
            asked[image].append(Question(text, answer))
        paths = getattr(package, f"get_{split}_image_paths")()
        self._scenes = [Scene(paths[image], tuple(asked[image])) for image in sorted(paths)]

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index):
        return self._scenes[index]


SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")


def description(scene: Scene) -> str | None:
    """The picture in words, "teal triangle", as far as its questions give it away."""
    said = " ".join(f"{q.text.rstrip('?')} {q.answer}" for q in scene.questions if is_open(q))
    words = said.split()
    shape = next((word for word in words if word in SHAPES), None)
    color = next((q.answer for q in scene.questions if is_open(q) and "color" in q.text), None)
    return None if shape is None or color is None else f"{color} {shape}"


def is_open(question: Question) -> bool:
    """Whether it asks for a color or shape, not for yes or no."""
    return question.answer not in YES_NO


def questions(split: Split) -> list[Question]:
    """All questions of a split, in order: what a tokenizer is trained on."""
    texts, answers, _ = getattr(_package(), f"get_{split}_questions")()
    return [Question(text, answer) for text, answer in zip(texts, answers, strict=True)]


def answers() -> list[str]:
    """The thirteen possible answers, in the order of the package."""
    return _package().get_answers()


def majority_accuracy() -> float:
    """On the test split, of always giving the commonest answer of the training split."""
    counts = collections.Counter(question.answer for question in questions("train"))
    ((guess, _),) = counts.most_common(1)
    test = questions("test")
    return sum(question.answer == guess for question in test) / len(test)


def blind_accuracy() -> float:
    """On the test split, of each question's own commonest answer: what the text alone gives away.

    A model that does no better has not looked at the picture.
    """
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for text, answer in questions("train"):
        counts[text][answer] += 1
    test = questions("test")
    return sum(counts[text].most_common(1)[0][0] == answer for text, answer in test) / len(test)


def _package():
    try:
        import easy_vqa
    except ImportError:
        raise InputError(
            "easy-VQA in this Python: the package easy-vqa is not installed; "
            "run pip install 'l32jax[quickstart]'"
        ) from None
    return easy_vqa
