"""A unit of work: some hundred records of one source, read, judged and made into samples."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from l32jax.data.images import choose_grid
from l32jax.data.prepare.config import PrepareConfig
from l32jax.data.prepare.content import Removed
from l32jax.data.prepare.duplicates import BAND
from l32jax.data.prepare.language import in_languages
from l32jax.data.prepare.pictures import usable_images
from l32jax.data.prepare.quality import good_text
from l32jax.data.prepare.signatures import CHECK_BYTES, Signature, signature
from l32jax.data.prepare.task import Task
from l32jax.data.prepare.workplace import Workplace
from l32jax.data.records import Bad, Record, image_size, to_sample
from l32jax.data.samples import Sample
from l32jax.data.shards import encode_sample
from l32jax.data.sources.open import open_records
from l32jax.data.tokenizer import Tokenizer
from l32jax.data.vocabulary import IMAGE
from l32jax.errors import InputError, one_line

# A sample of a unit's file: its record's number in all sources, and what statistics are made of.
ROW = np.dtype(
    [
        ("number", "<u8"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("tokens", "<u4"),
        ("images", "<u4"),
        ("tiles", "<u4"),
    ]
)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Records [start, stop) of a source, of which `first` were counted before this source."""

    number: int
    source: str
    start: int
    stop: int
    first: int


class Prepared(NamedTuple):
    """data: the encoded sample. counts: its tokens, images and tiles."""

    data: bytes
    counts: tuple[int, int, int]
    signature: Signature | None


@dataclasses.dataclass(frozen=True)
class UnitTask(Task):
    """Writes the files of a unit: samples, rows, and the bands and checks of its signatures."""

    config: PrepareConfig
    unit: Unit

    @property
    def result(self) -> Path:
        return self._place.unit(self.unit.number, "json")

    @property
    def _place(self) -> Workplace:
        return Workplace(Path(self.config.output))

    def run(self) -> None:
        place, number = self._place, self.unit.number
        rows: list[tuple[int, ...]] = []
        signatures: list[Signature | None] = []
        removed: Counter[str] = Counter()
        bad: list[dict[str, str]] = []
        with place.writing(place.unit(number, "samples")) as path, path.open("wb") as file:
            for record_number, found in judged(self.config, self.unit):
                if isinstance(found, Bad):
                    bad.append({"place": found.place, "why": found.why})
                elif isinstance(found, Removed):
                    removed[found.why] += 1
                else:
                    rows.append((record_number, file.tell(), len(found.data), *found.counts))
                    signatures.append(found.signature)
                    file.write(found.data)
        place.save(place.unit(number, "rows.npy"), np.array(rows, ROW))
        _save_signatures(place, number, signatures)
        with place.writing(self.result) as path:
            path.write_text(json.dumps({"removed": removed, "bad": bad}), encoding="utf-8")


def judged(config: PrepareConfig, unit: Unit) -> Iterator[tuple[int, Prepared | Removed | Bad]]:
    """Each record's number and what becomes of it."""
    records = _records(unit.source)
    for index in range(unit.start, unit.stop):
        record = records[index]
        try:
            yield unit.first + index, record if isinstance(record, Bad) else judge(record, config)
        except Exception as error:  # a fault of ours
            error.add_note(f"at {record.place}")
            raise


def judge(record: Record, config: PrepareConfig) -> Prepared | Removed | Bad:
    """What the rules leave of a record; nothing but the record and the config decides that."""
    tokenizer = _tokenizer(config.tokenizer)
    try:
        kept = _kept(record, config)
        if isinstance(kept, Removed):
            return kept
        sample = to_sample(kept, tokenizer, with_images=True)
        if isinstance(sample, Bad):
            return sample
        data, counts = encode_sample(sample), _counts(sample, config)
    except (InputError, OSError) as error:
        return Bad(record.place, one_line(error))
    return Prepared(data, counts, config.duplicates and signature(kept, config.duplicates))


def _kept(record: Record, config: PrepareConfig) -> Record | Removed:
    """Cheap rules come first."""
    kept: Record | Removed = record
    if config.text is not None:
        kept = good_text(kept, config.text)
    if config.languages and isinstance(kept, Record):
        kept = in_languages(kept, config.languages, config.min_language)
    if isinstance(kept, Record):
        size = {"tile_size": config.image_size, "max_tiles": config.max_tiles}
        kept = usable_images(kept, config.images, **size)
    return kept


def _counts(sample: Sample, config: PrepareConfig) -> tuple[int, int, int]:
    """Tokens, images and tiles."""
    tiles = 0
    for image in sample.images:
        assert isinstance(image, bytes)
        height, width = image_size(image)
        grid = choose_grid(height, width, tile_size=config.image_size, max_tiles=config.max_tiles)
        tiles += grid[0] * grid[1]
    tokens = sum(len(document.tokens) for document in sample.documents)
    return tokens, len(sample.images), tiles


def _save_signatures(place: Workplace, number: int, signatures: Sequence[Signature | None]) -> None:
    checks = np.zeros((len(signatures), CHECK_BYTES), np.uint8)
    bands = []
    for row, signed in enumerate(signatures):
        if signed is not None:
            checks[row] = signed.check
            bands += [(key, row) for key in signed.bands]
    place.save(place.unit(number, "checks.npy"), checks)
    place.save(place.unit(number, "bands.npy"), np.sort(np.array(bands, BAND), order="key"))


# Of each process: a unit of the same source follows.
@functools.lru_cache(maxsize=16)
def _records(source: str) -> Sequence[Record | Bad]:
    return open_records(source)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    """With an image token, for models that learn to see, unless text may become one."""
    found = Tokenizer.from_file(path)
    return found if IMAGE in found.specials else found.with_image_token()
