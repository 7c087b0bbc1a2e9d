"""How many questions of easy-VQA a model answers right."""

from collections.abc import Sequence

from l32jax.data.easy_vqa import EasyVqa, final_answer, questions
from l32jax.data.images import ImageSource, load_image
from l32jax.evaluate.asking import replies
from l32jax.generate.model import Model

REPLY = 12  # tokens at most: "brown rectangle, not yellow. yes" and the end


def ask(model: Model, asked: Sequence[tuple[str, ImageSource | None]]) -> list[str]:
    """The greedy reply to each question about its picture, or about none."""
    return replies(model, asked, max_new_tokens=REPLY)


def accuracy(model: Model) -> float:
    """Share of the 9,673 test questions whose reply comes down to the true answer."""
    asked, truths = [], []
    for scene in EasyVqa("test"):
        image = load_image(scene.image)
        asked += [(question.text, image) for question in scene.questions]
        truths += [question.answer for question in scene.questions]
    told = map(final_answer, ask(model, asked))
    return sum(map(str.__eq__, told, truths)) / len(truths)


def accuracy_without_pictures(model: Model) -> float:
    """The same when nothing is shown: a question then has one reply, whatever it was about."""
    test = questions("test")
    texts = sorted({question.text for question in test})
    told = dict(zip(texts, ask(model, [(text, None) for text in texts]), strict=True))
    return sum(final_answer(told[text]) == answer for text, answer in test) / len(test)
