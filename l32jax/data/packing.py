"""Which samples share a row: each cut to what a row holds, measured, and packed by grain.

A row is limited three ways: text tokens, images (the encoder computes every one as a whole canvas)
and tiles (what text attends to). Images are measured by their headers and decoded only when their
row is made.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from l32jax.data.beside import Beside
from l32jax.data.images import choose_grid
from l32jax.data.records import image_size
from l32jax.data.rows import VisionShape
from l32jax.data.samples import Document, Sample
from l32jax.errors import InputError

Packing = Literal["best_fit", "first_fit", "none"]
PACKERS = {
    "best_fit": grain.experimental.BestFitPackIterDataset,
    "first_fit": grain.experimental.FirstFitPackIterDataset,
}


class Size(NamedTuple):
    """What a sample takes of a row, or what a row holds."""

    text: int
    images: int
    tiles: int
    pairs: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
    """The fixed size of a row; text only if `vision` is None."""

    length: int
    vision: VisionShape | None = None
    beside: Beside = Beside()

    @property
    def size(self) -> Size:
        images, tiles = (self.vision.max_images, self.vision.slots) if self.vision else (0, 0)
        return Size(self.length, images, tiles, self.beside.pairs)

    def size_of(self, sample: Sample) -> Size:
        text = sum(len(document.tokens) for document in sample.documents)
        return Size(text, len(sample.images), sum(self.tiles_of(sample)), len(sample.pairs))

    def tiles_of(self, sample: Sample) -> list[int]:
        """Tiles of each image."""
        if not sample.images:
            return []
        vision = self.vision
        if vision is None:
            raise InputError(
                f"{len(sample.images)} images in a text-only row: set max_images of the data"
            )
        grids = (
            choose_grid(
                *image_size(image),
                tile_size=vision.encoder.image_size,
                max_tiles=vision.max_tiles,
            )
            for image in sample.images
        )
        return [rows * columns for rows, columns in grids]


def fit(sample: Sample, shape: RowShape, rng: np.random.Generator) -> list[Sample]:
    """The sample in pieces that each fit into a row, in order; none if there is nothing to learn.

    Of several documents over the same images, as many are kept as fit, drawn at random. A single
    one that is too long is cut where the row is full, of text or of images. A document to be
    learned throughout goes on in the next piece, which sees the images that begin there; a dialog
    ends at the cut, as the rest would make no sense without its beginning.

    Raises:
      InputError: images that no row holds, or documents none of which fits.
    Answers that are compared are neither cut nor left out.
    """
    shape.beside.require_learnable(sample)
    if all(need <= have for need, have in zip(shape.size_of(sample), shape.size, strict=True)):
        return [sample]
    if sample.pairs:
        raise InputError(
            f"comparison that takes {_told(shape.size_of(sample))}: a row holds "
            f"{_told(shape.size)}; lengthen rows, or raise max_pairs"
        )
    if len(sample.documents) > 1:
        return [_drawn(sample, shape, rng)]
    pieces = list(_pieces(sample, shape))
    learned = [piece for piece in pieces if any(piece.documents[0].weights[1:])]
    return learned if _is_learned_throughout(sample, shape) else learned[:1]


def _told(size: Size) -> str:
    return ", ".join(f"{number} of {name}" for name, number in size._asdict().items() if number)


def _drawn(sample: Sample, shape: RowShape, rng: np.random.Generator) -> Sample:
    needs, holds = shape.size_of(sample), shape.size
    if needs.images > holds.images or needs.tiles > holds.tiles:
        raise InputError(
            f"{needs.images} images of {needs.tiles} tiles under several documents: a row holds "
            f"{holds.images} of {holds.tiles}; raise max_images or vision_tiles"
        )
    chosen, used = [], 0
    for index in rng.permutation(len(sample.documents)):
        document = sample.documents[index]
        if used + len(document.tokens) <= shape.length:
            chosen.append(document)
            used += len(document.tokens)
    if not chosen or {i for document in chosen for i in document.images} != set(
        range(len(sample.images))
    ):
        raise InputError(
            f"sample of more than {shape.length} tokens: a row holds no more; lengthen rows"
        )
    return dataclasses.replace(sample, documents=tuple(chosen))


def _is_learned_throughout(sample: Sample, shape: RowShape) -> bool:
    (document,) = sample.documents
    is_text = ~_is_image(document, shape)
    is_text[:1] = False  # begin-of-text is never a target
    return bool(np.all(np.asarray(document.weights)[is_text]))


def _is_image(document: Document, shape: RowShape) -> np.ndarray:
    image_id = shape.vision.image_id if shape.vision else -1
    return np.asarray(document.tokens) == image_id


def _pieces(sample: Sample, shape: RowShape) -> Iterator[Sample]:
    (document,) = sample.documents
    image_at = np.flatnonzero(_is_image(document, shape))
    end = len(document.tokens)
    cuts = [0, *_cuts(end, image_at.tolist(), shape.tiles_of(sample), shape.size), end]
    for begin, stop in zip(cuts, cuts[1:], strict=False):
        first, last = np.searchsorted(image_at, (begin, stop))
        piece = Document(
            document.tokens[begin:stop],
            document.weights[begin:stop],
            tuple(range(last - first)),
            {name: found[begin:stop] for name, found in document.beside.items()},
        )
        yield dataclasses.replace(sample, documents=(piece,), images=sample.images[first:last])


def _cuts(end: int, image_at: Sequence[int], tiles: Sequence[int], holds: Size) -> Iterator[int]:
    """Where the next piece begins: where text is full, or at the image that finds no room."""
    begin = used_images = used_tiles = 0
    for position, needed in zip([*image_at, end], [*tiles, 0], strict=True):
        while position - begin > holds.text - (position < end):  # an image token needs room itself
            begin, used_images, used_tiles = begin + holds.text, 0, 0
            yield begin
        if position < end and (used_images == holds.images or used_tiles + needed > holds.tiles):
            begin, used_images, used_tiles = position, 0, 0
            yield begin
        used_images += 1
        used_tiles += needed


def in_order(pieces: Iterable[Sample], shape: RowShape) -> list[list[Sample]]:
    """Each in the row of the one before it, or in a new one where that is full."""
    rows: list[list[Sample]] = []
    left = Size(0, 0, 0)
    for piece in pieces:
        need = shape.size_of(piece)
        if not rows or any(n > room for n, room in zip(need, left, strict=True)):
            rows.append([])
            left = shape.size
        rows[-1].append(piece)
        left = Size(*(room - n for n, room in zip(need, left, strict=True)))
    return rows


def pack(
    samples: grain.IterDataset, shape: RowShape, *, packing: Packing, open_rows: int, seed: int
) -> grain.IterDataset:
    """Dictionaries with one `sample`, to dictionaries with the list `sample` of a row.

    `bad`, which is beside it, becomes a list as well.
    """
    if packing == "none":
        return samples.map(_alone)
    return PACKERS[packing](
        samples.map(_Measured(shape)),
        length_struct=_limits(shape),
        num_packing_bins=open_rows,
        seed=seed,
        shuffle_bins=True,
        meta_features=CARRIED,
    ).map(_carried)


CARRIED = ("sample", "bad")


def _limits(shape: RowShape) -> dict[str, int]:
    return {name: held for name, held in shape.size._asdict().items() if held}


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Adds what grain measures: its packer wants an array of the length of each thing it limits."""

    shape: RowShape

    def __call__(self, element: dict[str, Any]) -> dict[str, Any]:
        needs = self.shape.size_of(element["sample"])._asdict()
        return element | {name: np.zeros(needs[name], bool) for name in _limits(self.shape)}


def _alone(element: dict[str, Any]) -> dict[str, Any]:
    return {name: [element[name]] for name in CARRIED}


def _carried(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in CARRIED}
