"""Files of JSON lines that survive a kill: a line that was cut off is skipped, and costs itself."""

import json
from pathlib import Path
from typing import IO, Any, NamedTuple

MAX_BYTES = 16 << 20  # from the end of a file: some ten thousand lines, read in a tenth of a second
MAX_LINE = 1 << 20


class Lines(NamedTuple):
    """What could be read, in order, and the number of lines that could not."""

    records: list[dict[str, Any]]
    damaged: int


def open_to_append(path: Path) -> IO[bytes]:
    """Unbuffered. A last line that a kill has cut off is ended, so that the next one is whole."""
    file = path.open("a+b", buffering=0)
    if size := file.seek(0, 2):
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def append(file: IO[bytes], record: dict[str, Any]) -> None:
    """In one write, so that lines of several writers do not mix."""
    file.write(json.dumps(record).encode() + b"\n")


def read(path: Path) -> Lines:
    """The objects of a file that anybody may have written; none if there is no file."""
    records, damaged = [], 0
    for line in _last_lines(path):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            damaged += 1
        else:
            records.append(record)
    return Lines(records, damaged)


def _last_lines(path: Path) -> list[bytes]:
    if not path.is_file():
        return []
    with path.open("rb") as file:
        begin = max(file.seek(0, 2) - MAX_BYTES, 0)
        file.seek(begin)
        lines = file.read(MAX_BYTES).split(b"\n")
    return lines[1:] if begin else lines


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
