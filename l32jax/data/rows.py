"""Samples laid out as rows of fixed shape.

A row holds one or several samples end to end. Of its documents each starts at position 0, sees only
itself, and predicts nothing of the next.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from l32jax.config import Behaviour, LlamaConfig, VisionConfig
from l32jax.data.beside import Beside
from l32jax.data.features import Features
from l32jax.data.images import Grid, ImageSource, preprocess
from l32jax.data.samples import Document, Sample
from l32jax.errors import InputError

# Array by name: the layout that the model's step takes; FIELDS says the dimensions.
Batch = dict[str, np.ndarray]

# What each array of a batch holds, by its dimensions (see sharding.py):
#   tokens, positions  ids, and rotary positions inside the document
#   targets, weights   next tokens and their loss weights; 0 where there is none
#   start, stop        the keys [start, stop) of the row that each token sees; padding sees none
#   tiles, aspect      uint8 pixels, and (rows, columns) of tiles used; (0, 0) is no image
#   tile_index         image * c + tile for each slot of the vision axis: used tiles first
#   features           instead of tiles: what a frozen encoder made of the tile of each slot
#   vision_start, vision_stop  the keys [start, stop) on the vision axis that each token sees
# and what `beside` says of comparisons, and of what other models say of targets.
# A batch of prompts has no targets and weights, but the length of each prompt and the vision keys
# of the tokens that will follow it. A text-only batch has no vision fields.
FIELDS = {
    "tokens": "bt",
    "targets": "bt",
    "weights": "bt",
    "positions": "bt",
    "start": "bt",
    "stop": "bt",
    "tiles": "bic3yx",
    "features": "bse",
    "aspect": "bi2",
    "tile_index": "bm",
    "vision_start": "bt",
    "vision_stop": "bt",
    "length": "b",
    "next_vision_start": "b",
    "next_vision_stop": "b",
    "document": "bt",
    "pairs": "bq2",
    "margin": "bq",
    "format": "bt",
    "reference": "bt",
    "teacher_words": "btw",
    "teacher_logs": "btw",
    "advantage": "bt",
    "reward": "bt",
    "old": "bt",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionShape:
    """The fixed sizes of the vision side of a row.

    slots: tiles on the vision axis, shared by all images of the row.
    max_tiles: of one image's canvas; at most the encoder's own, which `tiles` is padded to.
    """

    encoder: VisionConfig
    image_id: int
    max_images: int
    slots: int
    max_tiles: int

    def __post_init__(self):
        assert self.slots <= self.max_images * self.encoder.max_tiles
        if not 1 <= self.max_tiles <= self.encoder.max_tiles:
            raise InputError(
                f"max_tiles={self.max_tiles} must lie between 1 and the encoder's "
                f"{self.encoder.max_tiles}"
            )

    @classmethod
    def of(
        cls, model: LlamaConfig, *, max_images: int, max_tiles: int, slots: int = 0
    ) -> "VisionShape":
        """Room for so many images of a row, by default all with as many tiles as they may have."""
        if model.vision is None:
            raise InputError(
                f"max_images={max_images} in the data: the model is text-only; set it to 0"
            )
        return cls(
            encoder=model.vision,
            image_id=model.decoder.vocab_size,
            max_images=max_images,
            slots=min(slots or max_images * max_tiles, max_images * max_tiles),
            max_tiles=max_tiles,
        )


def make_row(
    samples: Sequence[Sample],
    *,
    length: int,
    vision: VisionShape | None = None,
    features: Features | None = None,
    beside: Beside = Beside(),  # noqa: B008  (frozen)
) -> Batch:
    """One row of a batch, without its `b` dimension; no vision fields if `vision` is None.

    An image token is never a target: the head has no row for it.

    features: where those of the images are, which are then not decoded.
    beside: what else the row has; it has `document`, `pairs` and `margin` if answers are compared.
    """
    documents = [document for sample in samples for document in sample.documents]
    offsets = np.cumsum([0, *(len(document.tokens) for document in documents)])
    if offsets[-1] > length:
        raise InputError(
            f"{offsets[-1]} tokens in a row: it holds {length}; lengthen rows or split the sample"
        )
    whole = ("tokens", "targets", "positions", "start", "stop")
    row: Batch = {name: np.zeros(length, np.int32) for name in whole}
    row["weights"] = np.zeros(length, np.float32)
    for document, offset in zip(documents, offsets, strict=False):
        _write_text(row, document, int(offset))
    if vision is not None:
        row["weights"][row["targets"] == vision.image_id] = 0
        row |= _vision_fields(samples, length, vision, features)
    elif any(sample.images for sample in samples):
        raise InputError("images in a text-only row: the model or stage has no vision; drop them")
    row["targets"][row["weights"] == 0] = 0
    return row | beside.fields_of(samples, length)


def make_prompt_batch(
    prompts: Sequence[tuple[Sequence[int], Sequence[ImageSource]]],
    *,
    length: int,
    vision: VisionShape | None = None,
    after_prompt: Behaviour = "hf",
) -> Batch:
    """Prompts (tokens, images) padded on the right, and what the generated tokens will see.

    after_prompt: they see what the prompt's last token sees ("hf"), or nothing if the prompt has
      more than one image ("meta", whose last interval ends with the prompt).
    """
    rows = []
    for tokens, images in prompts:
        if not tokens:
            raise InputError("prompt without tokens: give at least the begin-of-text token")
        sample = Sample.single(tokens, [0.0] * len(tokens), images)
        row = make_row([sample], length=length, vision=vision)
        del row["targets"], row["weights"]
        row["length"] = np.array(len(tokens), np.int32)
        if vision is not None:
            blind = after_prompt == "meta" and len(images) > 1
            for name in ("vision_start", "vision_stop"):
                row[f"next_{name}"] = np.where(blind, 0, row[name][len(tokens) - 1])
        rows.append(row)
    return stack(rows)


def stack(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def vision_intervals(
    tokens: Sequence[int], image_id: int, tiles_per_image: Sequence[int]
) -> tuple[Int32[np.ndarray, "t"], Int32[np.ndarray, "t"]]:
    """The tiles [start, stop) that each token sees, the images' tiles lying end to end.

    An image is seen from its own token up to the next image token that does not belong to the same
    run of adjacent ones, or to the end (llama-models `create_vision_mask`). So a token sees the
    images of the latest run, as far as the run has come: one interval. (0, 0) before all images.
    """
    is_image = np.asarray(tokens) == image_id
    seen = np.cumsum(is_image)
    begins_run = is_image & ~np.concatenate([[False], is_image[:-1]])
    first = np.maximum.accumulate(np.where(begins_run, seen - 1, 0))
    ends = np.cumsum([0, *tiles_per_image], dtype=np.int32)
    return ends[first], ends[seen]


def _write_text(row: Batch, document: Document, offset: int) -> None:
    size = len(document.tokens)
    span = slice(offset, offset + size)
    row["tokens"][span] = document.tokens
    row["positions"][span] = np.arange(size)
    row["start"][span] = offset
    row["stop"][span] = np.arange(offset, offset + size) + 1
    predicting = slice(offset, offset + max(size - 1, 0))
    row["weights"][predicting] = document.weights[1:]
    row["targets"][predicting] = document.tokens[1:]


def _vision_fields(
    samples: Sequence[Sample], length: int, vision: VisionShape, features: Features | None
) -> Batch:
    images = [image for sample in samples for image in sample.images]
    if len(images) > vision.max_images:
        raise InputError(
            f"{len(images)} images in a row: it holds {vision.max_images}; raise max_images or "
            "split it"
        )
    aspect = np.zeros((vision.max_images, 2), np.int32)
    if features is None:
        seen = {"tiles": _tiles(images, aspect, vision)}
    else:
        seen = {"features": _features(images, aspect, vision, features)}
    counts = aspect[: len(images)].prod(axis=1)
    start, stop = _row_intervals(samples, counts, length, vision.image_id)
    return seen | {
        "aspect": aspect,
        "tile_index": _tile_index(counts, vision),
        "vision_start": start * vision.encoder.tokens_per_tile,
        "vision_stop": stop * vision.encoder.tokens_per_tile,
    }


def _tiles(images: Sequence[ImageSource], aspect: np.ndarray, vision: VisionShape) -> np.ndarray:
    """[i c 3 y x]; writes the grids of the images into `aspect`."""
    size = vision.encoder.image_size
    tiles = np.zeros((vision.max_images, vision.encoder.max_tiles, 3, size, size), np.uint8)
    for index, image in enumerate(images):
        aspect[index] = _write_tiles(tiles[index], image, vision)
    _require_slots(aspect, vision)
    return tiles


def _features(
    images: Sequence[ImageSource], aspect: np.ndarray, vision: VisionShape, features: Features
) -> np.ndarray:
    """[s e], tiles in the order of `_tile_index`; writes the images' grids into `aspect`."""
    stored = [features.find(image) for image in images]
    for index, (_, _, grid) in enumerate(stored):
        aspect[index] = grid
    _require_slots(aspect, vision)
    return features.read(stored, vision.slots).reshape(-1, vision.encoder.feature_dim)


def _require_slots(aspect: np.ndarray, vision: VisionShape) -> None:
    used = aspect.prod(axis=1).sum()
    if used > vision.slots:
        raise InputError(
            f"{used} tiles in a row: its vision axis holds {vision.slots}; "
            "raise it, or lower max_tiles"
        )


def _write_tiles(tiles: np.ndarray, image: ImageSource, vision: VisionShape) -> Grid:
    size, max_tiles = vision.encoder.image_size, vision.max_tiles
    _, grid = preprocess(image, tile_size=size, max_tiles=max_tiles, out=tiles)
    return grid


def _tile_index(counts: np.ndarray, vision: VisionShape) -> Int32[np.ndarray, "m"]:
    max_tiles = vision.encoder.max_tiles
    used = [image * max_tiles + tile for image, n in enumerate(counts) for tile in range(n)]
    # Only compat="hf" ever sees the rest.
    unused = np.setdiff1d(np.arange(vision.max_images * max_tiles), used)
    return np.concatenate([used, unused])[: vision.slots].astype(np.int32)


def _row_intervals(
    samples: Sequence[Sample], counts: np.ndarray, length: int, image_id: int
) -> tuple[Int32[np.ndarray, "t"], Int32[np.ndarray, "t"]]:
    """The interval of tiles of the row that each of its tokens sees."""
    starts, stops = np.zeros(length, np.int32), np.zeros(length, np.int32)
    offset, first_image = 0, 0
    for sample in samples:
        for document in sample.documents:
            images = [first_image + image for image in document.images]
            start, stop = _document_intervals(document, images, counts, image_id)
            span = slice(offset, offset + len(document.tokens))
            starts[span], stops[span] = start, stop
            offset = span.stop
        first_image += len(sample.images)
    return starts, stops


def _document_intervals(
    document: Document, images: list[int], counts: np.ndarray, image_id: int
) -> tuple[Int32[np.ndarray, "t"], Int32[np.ndarray, "t"]]:
    named = sum(token == image_id for token in document.tokens)
    if named != len(images):
        raise InputError(
            f"{named} image tokens in a document of {len(images)} images: "
            "each image needs one, and each stands for one"
        )
    start, stop = vision_intervals(document.tokens, image_id, counts[images].tolist())
    shift = counts[: images[0]].sum(dtype=np.int32) if images else np.int32(0)
    sees = stop > start
    return np.where(sees, start + shift, 0), np.where(sees, stop + shift, 0)
