"""How many questions of easy-VQA a model answers right."""

import numpy as np
from rich.progress import track

from l32jax.data.easy_vqa import EasyVqa, final_answer
from l32jax.data.images import load_image
from l32jax.generate.model import Model

ROWS = 128  # questions at a time
REPLY = 8  # tokens at most: "brown rectangle. yes" and the end


def accuracy(model: Model, *, blind: bool = False) -> float:
    """Share of the 9,673 test questions whose greedy reply comes down to the true answer.

    blind: ask without the pictures.
    """
    asked = [
        (question, [] if blind else [image])
        for scene in EasyVqa("test")
        for image in [load_image(scene.image)]
        for question in scene.questions
    ]
    right = []
    for first in track(range(0, len(asked), ROWS), "asking blind" if blind else "asking"):
        part = asked[first : first + ROWS]
        filled = part + part[-1:] * (ROWS - len(part))  # one shape, one compilation
        replies = model.generate(
            [question.text for question, _ in filled],
            images=[images for _, images in filled],
            max_new_tokens=REPLY,
        )
        told = map(final_answer, replies)
        right += [a == question.answer for a, (question, _) in zip(told, part, strict=False)]
    return float(np.mean(right))
