"""Documents and the images that they speak of, before they are laid out in rows.

A sample holds images and documents. Documents are strangers to each other, but several may look at
one image, which is then encoded once: ten questions about a picture are ten documents over the same
tiles.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from l32jax.data.images import ImageSource, load_image, mirrored_at_random
from l32jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Document:
    """Token ids, the loss weight of each as a target, and the images its image tokens stand for.

    `images` are consecutive indices into those of the sample: what a token sees is one interval.
    `beside` has more that belongs to each token as a target, by the names of `data.beside`.
    """

    tokens: Sequence[int]
    weights: Sequence[int | float]
    images: tuple[int, ...] = ()
    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        sizes = {len(self.tokens), len(self.weights), *map(len, self.beside.values())}
        assert len(sizes) == 1, sizes
        first = self.images[0] if self.images else 0
        consecutive = tuple(range(first, first + len(self.images)))
        assert first >= 0 and self.images == consecutive, self.images


class Pair(NamedTuple):
    """Documents of a sample, by number, of which one is the better answer, and by how much."""

    better: int
    worse: int
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """Documents over shared images, which stay encoded until the row is made.

    `place` is where it was read, for messages. Documents that are compared stay together.
    """

    documents: tuple[Document, ...]
    images: tuple[ImageSource, ...] = ()
    place: str = ""
    pairs: tuple[Pair, ...] = ()

    def __post_init__(self):
        named = {image for document in self.documents for image in document.images}
        if named != set(range(len(self.images))):
            raise InputError(
                f"images in a sample: documents name {sorted(named)} of {len(self.images)} images; "
                "every image needs an image token, and every image token an image"
            )

    @classmethod
    def single(
        cls,
        tokens: Sequence[int],
        weights: Sequence[int | float],
        images: Sequence[ImageSource] = (),
    ) -> "Sample":
        """One document whose image tokens stand for `images` in order."""
        document = Document(tokens, weights, tuple(range(len(images))))
        return cls((document,), tuple(images))


def mirror(sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample with left and right swapped in about half of its images."""
    images = tuple(mirrored_at_random(load_image(image), rng) for image in sample.images)
    return dataclasses.replace(sample, images=images)
