"""The files of a preparation under way, in a folder inside of the output that goes when it is done.

A file with its own name is whole: it was written under another and renamed. So whoever finds it
need not write it again, and two workers that write the same one do no harm.
"""

import dataclasses
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from l32jax.data.shards import shard_name


@dataclasses.dataclass(frozen=True)
class Workplace:
    """Paths below the output folder."""

    output: Path

    @property
    def folder(self) -> Path:
        return self.output / "unfinished"

    @property
    def begun(self) -> Path:
        """What is prepared here, in JSON."""
        return self.folder / "begun.json"

    @property
    def order(self) -> Path:
        """Where each sample of the output lies, in its order."""
        return self.folder / "order.npy"

    def unit(self, number: int, kind: str) -> Path:
        """Of a unit of records; .json is written last."""
        return self.folder / f"unit-{number:06}.{kind}"

    def duplicates(self, part: int) -> Path:
        return self.folder / f"duplicates-{part:04}.npy"

    def shard(self, number: int, count: int) -> Path:
        return self.output / shard_name(number, count)

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """A path to write to, which becomes `path`, on the disk, unless there is an error."""
        unfinished = self.folder / f"{path.name}.{uuid.uuid4().hex}.unfinished"
        try:
            yield unfinished
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def save(self, path: Path, array: np.ndarray) -> None:
        with self.writing(path) as unfinished, unfinished.open("wb") as file:
            np.save(file, array, allow_pickle=False)
