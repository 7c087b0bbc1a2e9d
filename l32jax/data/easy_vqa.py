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


COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")


def description(scene: Scene) -> str | None:
    """The picture in words, "teal triangle", as far as its questions give it away."""
    said = set().union(*map(_words_that_hold, scene.questions))
    color, shape = said & set(COLORS), said & set(SHAPES)
    return f"{color.pop()} {shape.pop()}" if color and shape else None


def _words_that_hold(question: Question) -> set[str]:
    words = _words(question)
    if is_open(question):
        return words | {question.answer}
    is_negated = not words.isdisjoint({"no", "not"})
    return words if (question.answer == "yes") != is_negated else set()


def _words(question: Question) -> set[str]:
    return set(question.text.rstrip("?").split())


def conclusion(description: str, question: Question) -> str:
    """How a reply goes on after the description: ". yes", or ", not red. yes".

    It first tells whether the picture has what was asked about. The answer follows from that and
    from whether the question has a "not": said in one word, that is an exclusive or of the two,
    which a small model learns late, and from some seeds never.
    """
    asked = _words(question) & {*COLORS, *SHAPES}
    missing = sorted(asked.difference(description.split()))
    return "".join(f", not {word}" for word in missing) + f". {question.answer}"


def balanced(scene: Scene) -> list[Question]:
    """Its questions, but of those for yes or no at most two misses for each that hits the picture.

    Seven of eight colors asked about are not the picture's: as they are, it pays to answer without
    comparing.
    """
    hits = [q for q in scene.questions if is_open(q) or _words_that_hold(q)]
    misses = [q for q in scene.questions if q not in hits]
    return hits + misses[: max(1, 2 * sum(not is_open(q) for q in hits))]


def final_answer(reply: str) -> str:
    """What a reply comes down to: its last word, "no" of "teal triangle, not red. no"."""
    return reply.split()[-1] if reply.strip() else ""


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
    guesses, test = majority_answers(), questions("test")
    return sum(guesses[text] == answer for text, answer in test) / len(test)


def majority_answers() -> dict[str, str]:
    """For each question its commonest answer in training."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for text, answer in questions("train"):
        counts[text][answer] += 1
    return {text: counter.most_common(1)[0][0] for text, counter in counts.items()}


def _package():
    try:
        import easy_vqa
    except ImportError:
        raise InputError(
            "easy-VQA in this Python: the package easy-vqa is not installed; "
            "run pip install 'l32jax[quickstart]'"
        ) from None
    return easy_vqa
