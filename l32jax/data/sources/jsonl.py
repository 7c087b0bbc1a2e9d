"""JSON lines: an object a line, with images in files beside it."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from l32jax.data.files import File, read_beside
from l32jax.data.images import MAX_BYTES
from l32jax.data.records import Bad, Record
from l32jax.data.sources.fields import make_record
from l32jax.errors import InputError, one_line

MAX_LINE_BYTES = 64 << 20
NEWLINE = ord("\n")


class JsonLines:
    """The lines of a file, except for empty ones. Only where they begin is kept in memory."""

    def __init__(self, file: File):
        self._file = file
        self._starts = np.concatenate([[0], *_line_ends(file), [file.size + 1]])
        # A line of one letter is the other half of a line break.
        self._lines = np.flatnonzero(np.diff(self._starts) > len("\r\n"))
        if not len(self._lines):
            raise InputError(f"source {file.where}: it has no lines; check the path")

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, number: int) -> Record | Bad:
        line = int(self._lines[number])
        start, stop = int(self._starts[line]), int(self._starts[line + 1]) - 1
        place = f"{self._file.name} line {line + 1}"
        if stop - start > MAX_LINE_BYTES:
            return Bad(place, f"it is longer than {MAX_LINE_BYTES} bytes")
        return record_of_json(self._file, start, stop - start, place)


def record_of_json(file: File, start: int, size: int, place: str) -> Record | Bad:
    try:
        fields = parse_json(file.read(start, size))
    except InputError as error:
        return Bad(place, one_line(error))
    find = functools.partial(read_beside, file.folder, at_most=MAX_BYTES)
    return make_record(fields, place, find)


def parse_json(data: bytes) -> Any:
    """InputError, with the reason alone, for what is not JSON in UTF-8."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({one_line(error)})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({one_line(error)})") from None


def _line_ends(file: File) -> Iterator[np.ndarray]:
    offset = 0
    for block in file.blocks():
        yield np.flatnonzero(np.frombuffer(block, np.uint8) == NEWLINE) + (offset + 1)
        offset += len(block)
