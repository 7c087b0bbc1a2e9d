"""Data sets as Hugging Face's `datasets` saves them: a folder of Arrow streams and a state.json.

The streams are mapped into memory: a row costs what it is itself, wherever it stands.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from l32jax.data.files import File, local_copy
from l32jax.data.records import Bad, Record
from l32jax.data.sources.columns import (
    Damaged,
    known_fields,
    pyarrow_module,
    reading,
    record_of_row,
)
from l32jax.data.sources.jsonl import parse_json
from l32jax.errors import InputError

STATE = "state.json"
MAX_STATE_BYTES = 64 << 20


def saved_files(files: list[File]) -> list[File]:
    """Of the files of a folder the streams that its state.json lists, in order."""
    by_name = {file.name: file for file in files}
    state = by_name[STATE]
    try:
        content = parse_json(state.read(0, min(state.size, MAX_STATE_BYTES)))
        names = [entry["filename"] for entry in content["_data_files"]]
        return [by_name[name] for name in names]
    except (InputError, TypeError, KeyError):
        raise InputError(
            f"source {state.where}: damaged, or lacks a file that it names; save it again"
        ) from None


class ArrowRows:
    """The rows of a stream, or of a copy of it on this machine if it is in a bucket."""

    def __init__(self, file: File):
        self._file = file
        self._path = local_copy(file)
        try:
            with reading(file):
                batches = _batches(self._path)
                columns = batches[0].schema.names if batches else []
        except Damaged as error:
            raise InputError(
                f"source {file.where}: not a whole Arrow stream ({error}); copy it again"
            ) from None
        self._ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)
        if not len(batches) or not len(self):
            raise InputError(f"source {file.where}: it has no rows; check the path")
        self._columns = tuple(known_fields(columns, file))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, number: int) -> Record | Bad:
        place = f"{self._file.name} row {number}"
        batch = int(np.searchsorted(self._ends, number, side="right"))
        begin = int(self._ends[batch - 1]) if batch else 0
        try:
            with reading(self._file):
                rows = _checked_batch(self._path, batch, self._columns)
            return record_of_row(rows, number - begin, self._file, place)
        except Damaged as error:
            return Bad(place, f"damaged ({error})")


@functools.lru_cache(maxsize=256)
def _batches(path: Path) -> list[Any]:
    """Views of the mapped file, which take no memory."""
    pyarrow = pyarrow_module("pyarrow")
    mapped = pyarrow.memory_map(str(path))
    batches = list(pyarrow_module("pyarrow.ipc").open_stream(mapped))
    if mapped.tell() != mapped.size():  # zeros in the middle say that the stream ends there
        raise Damaged(f"it ends after {mapped.tell()} of {mapped.size()} bytes")
    return batches


@functools.lru_cache(maxsize=4096)
def _checked_batch(path: Path, number: int, columns: tuple[str, ...]) -> Any:
    """Offsets of a damaged one may lead out of the file."""
    batch = _batches(path)[number].select(list(columns))
    batch.validate(full=True)
    return batch
