"""What follows when all units are done: duplicates are found, and shards written in a new order."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt64

from l32jax.data.prepare.config import Duplicates
from l32jax.data.prepare.duplicates import groups, later_ones, part_of_keys
from l32jax.data.prepare.task import Task
from l32jax.data.prepare.workplace import Workplace
from l32jax.data.shard_file import write_shard
from l32jax.data.shards import is_whole
from l32jax.errors import InputError

PLACE = np.dtype([("unit", "<u4"), ("offset", "<u8"), ("size", "<u4")])
OPEN_FILES = 128


@dataclasses.dataclass(frozen=True)
class DuplicatesTask(Task):
    """Writes the numbers of records that a part of the keys says are duplicates."""

    place: Workplace
    rules: Duplicates
    units: int
    part: int
    parts: int

    @property
    def result(self) -> Path:
        return self.place.duplicates(self.part)

    def run(self) -> None:
        found = [self._part_of(unit) for unit in range(self.units)]
        bands = np.concatenate(found)
        unit_of = np.repeat(np.arange(self.units), list(map(len, found)))
        # Rows are in the order of records, and so are units.
        places = unit_of.astype(np.uint64) << np.uint64(32) | bands["row"]
        later: set[int] = set()
        for group in groups(bands["key"], places):
            which = list(zip(unit_of[group].tolist(), bands["row"][group].tolist(), strict=True))
            checks = np.stack([self._checks(unit)[row] for unit, row in which])
            chosen = [which[index] for index in later_ones(checks, self.rules)]
            later.update(int(self._rows(unit)["number"][row]) for unit, row in chosen)
        self.place.save(self.result, np.array(sorted(later), np.uint64))

    def _part_of(self, unit: int) -> np.ndarray:
        bands = np.load(self.place.unit(unit, "bands.npy"), mmap_mode="r")
        return np.array(part_of_keys(bands, self.part, self.parts))

    def _checks(self, unit: int) -> np.ndarray:
        return _mapped(self.place.unit(unit, "checks.npy"))

    def _rows(self, unit: int) -> np.ndarray:
        return _mapped(self.place.unit(unit, "rows.npy"))


@dataclasses.dataclass(frozen=True)
class ShardTask(Task):
    """Writes the samples [start, stop) of the order as a shard."""

    place: Workplace
    number: int
    count: int
    start: int
    stop: int

    @property
    def result(self) -> Path:
        return self.place.shard(self.number, self.count)

    def run(self) -> None:
        with self.place.writing(self.result) as path:
            write_shard(path, self._samples())

    def _samples(self) -> Iterator[bytes]:
        order = np.load(self.place.order, mmap_mode="r")

        @functools.lru_cache(OPEN_FILES)
        def opened(unit: int) -> BinaryIO:
            return self.place.unit(unit, "samples").open("rb")

        for unit, offset, size in order[self.start : self.stop].tolist():
            file = opened(unit)
            file.seek(offset)
            data = file.read(size)
            if not is_whole(data):
                raise InputError(
                    f"sample in {self.place.unit(unit, 'samples')}: damaged on the disk; "
                    f"remove {self.place.output}, and prepare the data again"
                )
            yield data


def shuffled(numbers: UInt64[np.ndarray, "n"], seed: int) -> np.ndarray:
    """The order of records: that of their mixed numbers, the same in every version of numpy."""
    return np.argsort(_mixed(numbers ^ _mixed(np.array([seed], np.uint64))), kind="stable")


def bounds(count: int, shards: int) -> Sequence[tuple[int, int]]:
    """As even as can be."""
    ends = [count * i // shards for i in range(shards + 1)]
    return list(zip(ends, ends[1:], strict=False))


def _mixed(x: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """SplitMix64 (Steele et al. 2014): a bijection that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(OPEN_FILES)
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")
