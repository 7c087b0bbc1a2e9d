"""ArrayRecord files that others made: a JSON object in UTF-8 a record."""

import functools
import os
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from l32jax.data.files import File, local_copy, read_beside
from l32jax.data.images import MAX_BYTES
from l32jax.data.records import Bad, Record
from l32jax.data.sources.fields import make_record
from l32jax.data.sources.jsonl import MAX_LINE_BYTES, parse_json
from l32jax.errors import InputError, one_line

READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
READ_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)  # what its C++ raises


class ArrayRecords:
    """A file, or a copy of it on this machine if it is in a bucket: the reader knows no other."""

    def __init__(self, file: File):
        self._file = file
        self._path = local_copy(file)
        try:
            self._size = int(_reader(self._path).num_records())
        except READ_ERRORS as error:
            raise InputError(
                f"source {file.where}: not an ArrayRecord file ({one_line(error)}); write it again"
            ) from None
        if not self._size:
            raise InputError(f"source {file.where}: it has no records; check the path")

    def __len__(self) -> int:
        return self._size

    def read(self, number: int) -> Record | Bad:
        place = f"{self._file.name} record {number}"
        try:
            data = _reader(self._path).read([number])[0]
        except READ_ERRORS as error:
            return Bad(place, f"damaged ({one_line(error)})")
        if len(data) > MAX_LINE_BYTES:
            return Bad(place, f"it is longer than {MAX_LINE_BYTES} bytes")
        try:
            fields = parse_json(data)
        except InputError as error:
            return Bad(place, one_line(error))
        find = functools.partial(read_beside, self._file.folder, at_most=MAX_BYTES)
        return make_record(fields, place, find)


@functools.lru_cache(maxsize=256)
def _reader(path: Path) -> Any:
    return ArrayRecordReader(os.fspath(path), READER_OPTIONS)
