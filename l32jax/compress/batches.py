"""What a model is calibrated on, and judged by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from l32jax.config import LlamaConfig
from l32jax.data.batches import make_batches, place
from l32jax.data.packing import RowShape
from l32jax.data.rows import VisionShape
from l32jax.data.sources.open import open_source
from l32jax.data.streams import Rows, Source
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.sharding import row_parts

HELD_OUT = 10  # of the calibration's records, the last of so many parts
JUDGED = 1 / 4  # rows to judge by, for each row of calibration
IMAGES = 4  # of a row, of a vision model
TOKENS = 2048  # of a batch, for each part that the mesh has rows in; one row at least
MAX_BAD = 0.01
SEED = 0

Batches = list[dict[str, jax.Array]]


class Sets(NamedTuple):
    """Batches on the mesh."""

    calibration: Batches
    held_out: Batches


@dataclass(frozen=True)
class Slice(Sequence):
    """Some consecutive records of a source."""

    source: Source
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index):
        return self.source[self.start + index]


def open_sets(
    config: LlamaConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    calibration: str,
    held_out: str | None,
    rows: int,
    length: int,
) -> Sets:
    """At least `rows` packed rows, and a quarter as many that are held out.

    A source with fewer comes round again, packed in other rows.

    Args:
      calibration, held_out: names of sources; without the second, records of the first are held
        out.
    """
    with_images = config.vision is not None
    source = open_source(calibration, tokenizer, with_images=with_images)
    if held_out is None:
        split = len(source) - len(source) // HELD_OUT
        if split == len(source):
            raise InputError(
                f"source {calibration!r} of the calibration: of {len(source)} records none can be "
                "held out; name another source with --held-out"
            )
        parts = Slice(source, 0, split), Slice(source, split, len(source))
    else:
        parts = source, open_source(held_out, tokenizer, with_images=with_images)
    shape = _row_shape(config, length)
    counts = rows, math.ceil(rows * JUDGED)
    pairs = zip(parts, counts, strict=True)
    return Sets(*(_batches(part, shape, mesh, count) for part, count in pairs))


def _row_shape(config: LlamaConfig, length: int) -> RowShape:
    if config.vision is None:
        return RowShape(length=length)
    vision = VisionShape.of(config, max_images=IMAGES, max_tiles=config.vision.max_tiles)
    return RowShape(length=length, vision=vision)


def _batches(source: Source, shape: RowShape, mesh: Mesh, rows: int) -> Batches:
    parts = row_parts(mesh.shape)
    size = parts * max(1, min(TOKENS // shape.length, math.ceil(rows / parts)))
    made = make_batches(
        [source], [1.0], Rows(shape=shape), batch_size=size, seed=SEED, max_bad=MAX_BAD
    )
    found = []
    try:
        while len(found) * size < rows:
            found.append(place(next(made), mesh))
    finally:
        made.close()
    return found
