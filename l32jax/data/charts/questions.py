"""What is asked about a picture, and the true answers."""

import random
from collections.abc import Iterator

from l32jax.data.charts.scenes import LETTERS, Question, Scene, row_text, total


def questions(scene: Scene) -> list[Question]:
    """Every question about a picture, those that compare for a random pair of its rows."""
    asked = {
        "bars": _about_bars,
        "line": _about_line,
        "table": _about_table,
        "receipt": _about_receipt,
        "sign": _about_sign,
    }[scene.picture](scene)
    return [q._replace(kind=f"{scene.picture} {q.kind}") for q in asked]


def reply(scene_description: str, question: Question) -> str:
    """What is seen, what of it decides if that is not all, and the answer: ". " between each."""
    return ". ".join(filter(None, (scene_description, question.because, question.answer)))


def final_answer(told: str) -> str:
    """What a reply comes down to: "red" of "bars: red7, blue3. red"."""
    return told.strip().rpartition(". ")[2]


def _about_bars(scene: Scene) -> Iterator[Question]:
    for name, number in scene.firsts.items():
        yield Question("value", f"how high is {name}?", str(number), row_text(name, number))
    yield Question("most", "which bar is highest?", _most(scene))
    yield Question("least", "which bar is lowest?", _least(scene))
    yield _comparison(scene, "is {} higher than {}?")
    yield Question("count", "how many bars are there?", str(len(scene.rows)))
    yield from _about_title(scene)


def _about_line(scene: Scene) -> Iterator[Question]:
    for name, number in scene.firsts.items():
        text = f"how high is the line at {name}?"
        yield Question("value", text, str(number), row_text(name, number))
    yield Question("most", "where is the line highest?", _most(scene))
    yield Question("least", "where is the line lowest?", _least(scene))
    yield _comparison(scene, "is it higher at {} than at {}?")
    yield Question("count", "how many points has the line?", str(len(scene.rows)))
    yield from _about_title(scene)


def _about_table(scene: Scene) -> Iterator[Question]:
    for name, numbers in scene.rows:
        row = row_text(name, *numbers)
        for column, number in zip(LETTERS, numbers, strict=False):
            yield Question("value", f"what is {column} of {name}?", str(number), row)
    yield Question("most", "which row has the highest a?", _most(scene))
    yield Question("least", "which row has the lowest a?", _least(scene))
    yield _comparison(scene, "is a of {} higher than of {}?")
    yield Question("count", "how many rows are there?", str(len(scene.rows)))
    yield from _about_lines(scene, "row")


def _about_receipt(scene: Scene) -> Iterator[Question]:
    for name, number in scene.firsts.items():
        yield Question("value", f"what does {name} cost?", str(number), row_text(name, number))
    yield Question("total", "what comes after total?", str(total(scene)))
    yield Question("most", "what costs most?", _most(scene))
    yield Question("least", "what costs least?", _least(scene))
    yield _comparison(scene, "does {} cost more than {}?")
    yield from _about_lines(scene, "line")


def _about_sign(scene: Scene) -> Iterator[Question]:
    yield Question("color", "what color is the sign?", scene.plate)
    yield Question("count", "how many words are on the sign?", str(len(scene.rows)))
    yield Question("word", "what does the sign say?", " ".join(scene.names))


def _about_title(scene: Scene) -> Iterator[Question]:
    if scene.title:
        yield Question("title", "what is the title?", scene.title)


def _about_lines(scene: Scene, line: str) -> Iterator[Question]:
    for number, name in enumerate(scene.names, start=1):
        yield Question("word", f"what word is on {line} {number}?", name)


def _comparison(scene: Scene, text: str) -> Question:
    """Yes as often as no: whatever is drawn first is the higher one half of the time."""
    rng = random.Random(str(scene.rows))
    first, second = rng.sample(scene.names, 2)
    a, b = scene.firsts[first], scene.firsts[second]
    answer = "yes" if a > b else "no"
    return Question(
        "compare",
        text.format(first, second),
        answer,
        f"{row_text(first, a)}, {row_text(second, b)}",
    )


def _most(scene: Scene) -> str:
    return max(scene.firsts, key=scene.firsts.__getitem__)


def _least(scene: Scene) -> str:
    return min(scene.firsts, key=scene.firsts.__getitem__)
