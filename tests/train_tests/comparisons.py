"""Rows in which answers are compared, over pictures or not, for the small model."""

import numpy as np

from l32jax.data.beside import Beside
from l32jax.data.rows import Batch, VisionShape, make_row, stack
from l32jax.data.samples import Document, Pair, Sample
from l32jax.objective_config import Objective
from tests.train_tests.small import IMAGE_ID, MODEL

LENGTH, PAIRS = 48, 4
VISION = VisionShape.of(MODEL, max_images=2, max_tiles=4)


def comparison(random: np.random.Generator, *, answers: int, pictures: int) -> Sample:
    """A prompt, and answers of different lengths to it, each better than all that follow."""
    prompt = [*[IMAGE_ID] * pictures, *random.integers(1, 256, 3).tolist()]
    documents = []
    for _ in range(answers):
        answer = random.integers(1, 256, random.integers(2, 5)).tolist()
        tokens = [*prompt, *answer]
        weights = [0.0] * len(prompt) + [1.0] * len(answer)
        ends = np.zeros(len(tokens), np.float32)
        ends[-1] = 1
        beside = {"format": ends, "reference": random.normal(-3, 1, len(tokens))}
        documents.append(Document(tokens, weights, tuple(range(pictures)), beside))
    pairs = (Pair(i, j, float(j - i)) for i in range(answers) for j in range(i + 1, answers))
    images = [random.integers(0, 256, (28, 28 * (1 + i), 3), np.uint8) for i in range(pictures)]
    return Sample(tuple(documents), tuple(images), pairs=tuple(pairs))


def compared_rows(objective: Objective, *, images: bool, count: int = 4) -> Batch:
    """Rows of three answers, of two pairs, and of one pair; with images, a text-only one too."""
    random = np.random.default_rng(3)
    made = []
    for row in range(count):
        shown = int(images and row != 1)
        samples = [
            [comparison(random, answers=3, pictures=shown)],
            [comparison(random, answers=2, pictures=shown) for _ in range(2)],
            [comparison(random, answers=2, pictures=shown)],
        ][row % 3]
        beside = Beside.of(objective, PAIRS)
        vision = VISION if images else None
        made.append(make_row(samples, length=LENGTH, vision=vision, beside=beside))
    return stack(made)
