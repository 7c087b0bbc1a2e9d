"""Samples with pictures, of every kind that a row can hold."""

import io

import numpy as np
from PIL import Image

from l32jax.config import VisionConfig
from l32jax.data.rows import VisionShape
from l32jax.data.samples import Document, Sample

IMAGE_ID = 99
VISION = VisionShape(
    encoder=VisionConfig(image_size=28, num_local_layers=3, taps=(1, 2)),
    image_id=IMAGE_ID,
    max_images=4,
    slots=12,
    max_tiles=4,
)


def png(height: int, width: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Text alone, one image and several, in between text too, and several documents over one."""
    rng = np.random.default_rng(seed)

    def words(most: int) -> list[int]:
        return rng.integers(2, 90, int(rng.integers(2, most))).tolist()

    def pictures(number: int) -> list[bytes]:
        sides = rng.integers(8, 90, (number, 2)).tolist()
        return [png(height, width, int(rng.integers(1 << 30))) for height, width in sides]

    made = []
    for index in range(count):
        number = index % 4
        if index % 7 == 6:
            texts = [words(12) for _ in range(3)]
            documents = tuple(
                Document([1, IMAGE_ID, *text], [0.0, 0.0, *([1.0] * len(text))], (0,))
                for text in texts
            )
            made.append(Sample(documents, tuple(pictures(1)), place=f"record {index}"))
            continue
        tokens = [1]
        for _ in range(number):
            tokens += [IMAGE_ID, *(words(10) if rng.integers(2) else [])]
        tokens += words(30)
        weights = [float(token not in (1, IMAGE_ID)) for token in tokens]
        document = Document(tokens, weights, tuple(range(number)))
        made.append(Sample((document,), tuple(pictures(number)), place=f"record {index}"))
    return made
