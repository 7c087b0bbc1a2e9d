"""A shard: an ArrayRecord file whose records are found even where it is damaged.

Each record carries its number and is stored as it is. So where ArrayRecord cannot find its way any
more, a footer or a header being damaged, the file is read through for records: a flipped bit costs
the record it is in, and no other.
"""

import contextlib
import functools
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from l32jax.errors import InputError, one_line

# A mark to look for, the record's number, its size, and the CRC of these two.
HEADER = struct.Struct("<8sQQI")
MARK = b"\xf5l32jax\xf6"  # not UTF-8, so never in text
# Riegeli, the format below ArrayRecord, has a header at every multiple of a block's size.
BLOCK, BLOCK_HEADER = 1 << 16, 24
SCANNED_BYTES = 16 << 20


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """A shard of records; the same records make the same bytes."""
    try:
        # One record a chunk, as random access wants it; uncompressed, for `_Salvage`.
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for number, record in enumerate(records):
            writer.write(_header(number, len(record)) + record)
        writer.close()
    except RuntimeError as error:  # what its C++ makes of a full disk
        raise OSError(f"{path}: {one_line(error)}") from None


class Shard:
    """Reads records by number. The file is opened when that is needed, in whatever process."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Shard, (self.path,)

    def __len__(self) -> int:
        return int(self._reader.num_records())

    def read(self, number: int) -> bytes:
        """A record as it is now: that its bits are those once written, a checksum has to tell.

        Raises:
          InputError: it is damaged beyond finding it. OSError: the file cannot be read.
        """
        with contextlib.suppress(RuntimeError, ValueError, IndexError):  # what its C++ raises
            found = self._reader.read([number])[0]
            record = found[HEADER.size :]
            if found.startswith(_header(number, len(record))):
                return record
        return self._salvage.read(number)

    @functools.cached_property
    def _reader(self) -> ArrayRecordReader:
        options = "readahead_buffer_size:0,max_parallelism:0"
        return ArrayRecordReader(os.fspath(self.path), options)

    @functools.cached_property
    def _salvage(self) -> "_Salvage":
        return _Salvage(self.path)


class _Salvage:
    """The records of a damaged shard, found by their marks.

    Places are counted without the blocks' headers, which may lie inside of records.
    """

    def __init__(self, path: Path):
        self._path = path
        self._places: dict[int, tuple[int, int]] = {}
        with path.open("rb") as file:
            for number, place, size in _records(file, _unblocked_size(path.stat().st_size)):
                self._places.setdefault(number, (place, size))

    def read(self, number: int) -> bytes:
        if number not in self._places:
            raise InputError("record of a shard: damaged beyond finding it; prepare the data again")
        with self._path.open("rb") as file:
            return _read_unblocked(file, *self._places[number])


def _records(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, place and size of every record whose header is whole; what is inside is skipped."""
    start, place = 0, 0
    data = _read_unblocked(file, start, SCANNED_BYTES)
    while len(data) >= HEADER.size:
        last = len(data) - HEADER.size  # where a header of these data may begin
        found = data.find(MARK, place - start, last + len(MARK))
        if found < 0:
            start = place = max(place, start + last + 1)
            data = _read_unblocked(file, start, SCANNED_BYTES)
            continue
        _, number, size, _ = HEADER.unpack_from(data, found)
        begin = start + found + HEADER.size
        is_record = data.startswith(_header(number, size), found) and begin + size <= end
        if is_record:
            yield number, begin, size
        place = begin + size if is_record else start + found + 1


def _unblocked_size(size: int) -> int:
    blocks, rest = divmod(size, BLOCK)
    return blocks * (BLOCK - BLOCK_HEADER) + max(rest - BLOCK_HEADER, 0)


def _read_unblocked(file: BinaryIO, place: int, size: int) -> bytes:
    payload = BLOCK - BLOCK_HEADER
    first, skipped = divmod(place, payload)
    file.seek(first * BLOCK)
    blocks = file.read(-(-(skipped + size) // payload) * BLOCK)
    starts = range(BLOCK_HEADER, len(blocks), BLOCK)
    return b"".join(blocks[i : i + payload] for i in starts)[skipped : skipped + size]


def _header(number: int, size: int) -> bytes:
    return HEADER.pack(MARK, number, size, zlib.crc32(struct.pack("<QQ", number, size)))
