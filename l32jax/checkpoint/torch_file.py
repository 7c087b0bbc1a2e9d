"""torch's .pth files: a zip archive of raw tensors and of the pickle that says what they are.

    consolidated/data.pkl   the state dict, see `torch_pickle`
    consolidated/byteorder  "little"
    consolidated/data/0     the numbers of the tensor whose storage has the key 0, uncompressed
    consolidated/version    "3"

The format of torch 1.6 and later, read mapped into memory and planned to be written.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from l32jax.checkpoint import torch_pickle
from l32jax.checkpoint.engine.flat_files import FlatFile, Place
from l32jax.checkpoint.engine.mapped import Mapped
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.workplace import Record
from l32jax.checkpoint.torch_pickle import View
from l32jax.errors import InputError, one_line

PICKLE, BYTE_ORDER, VERSION = "data.pkl", "byteorder", "version"
ROOT = "consolidated/"
ALIGNMENT = 64  # of every entry's content, as torch writes and maps it
MAX_INDEX_BYTES = 16 << 20  # of the archive's list of entries: some 200,000

# The records of a zip archive. Sizes and offsets are always given in the fields of 64 bits, so that
# the few files of more than 4 GiB are made as all others are.
LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END_64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")
UNPADDED = LOCAL.size + 20 + 4  # of a header without name: two sizes of 64 bits, empty padding
IN_64_BITS, NEEDED_VERSION = 0xFFFFFFFF, 45
MIDNIGHT, FIRST_DAY = 0, 0x21  # 1980-01-01: the same tensors make the same bytes


def open_file(path: Path) -> Source:
    """The tensors of a state dict that `torch.save` wrote, mapped; no pickle is executed.

    InputError if the file is damaged, compressed, of the format before torch 1.6, or wants anything
    but tensors.
    """
    try:
        mapped = Mapped(path)
        content = _contents(path, mapped.content)
        views = torch_pickle.read(content[PICKLE].tobytes())
        arrays = {name: _array(content, view) for name, view in views.items()}
    except InputError as error:
        raise InputError(f"weights in {path}: {error}; nothing of it was executed") from None
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InputError(f"weights in {path}: {one_line(error)}; download the file again") from None
    return Source.of(arrays, str(path), mapped.release)


def _contents(path: Path, file: np.ndarray) -> dict[str, np.ndarray]:
    """The bytes of the archive's entries, by their names below its one folder."""
    if file[:1].tobytes() == b"\x80":
        raise InputError("it has the format of torch before 1.6; load it and save it again there")
    with _Cautious(path) as stream, zipfile.ZipFile(stream) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    root = _root([entry.filename for entry in entries])
    contents: dict[str, np.ndarray] = {}
    end = 0
    for entry in entries:
        if entry.header_offset < end:
            raise ValueError(f"its entry {entry.filename[:80]!r} overlaps another")
        begin, end = _place(entry, file)
        name = entry.filename.removeprefix(root)
        if name in contents:
            raise ValueError(f"its entry {entry.filename[:80]!r} is there twice")
        contents[name] = file[begin:end]
    if contents.get(BYTE_ORDER, np.frombuffer(b"little", np.uint8)).tobytes() != b"little":
        raise InputError("its numbers are big-endian; save it again on a usual machine")
    return contents


class _Cautious(io.FileIO):
    """A file whose list of entries cannot have any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        if (rest if size is None or size < 0 else size) > MAX_INDEX_BYTES:
            raise ValueError(f"its list of entries exceeds {MAX_INDEX_BYTES} bytes")
        return super().read(size) or b""


def _root(names: list[str]) -> str:
    roots = [name.removesuffix(PICKLE) for name in names if name.endswith(f"/{PICKLE}")]
    if len(roots) != 1:
        raise ValueError("it is a zip archive, but not one that torch.save wrote")
    return roots[0]


def _place(entry: zipfile.ZipInfo, file: np.ndarray) -> tuple[int, int]:
    """Where the bytes of an entry begin and end; they must be in the file as they are."""
    name = entry.filename[:80]
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise InputError(f"its entry {name!r} is compressed, which torch.save never does")
    if entry.flag_bits & 1:
        raise InputError(f"its entry {name!r} is encrypted")
    head = file[entry.header_offset : entry.header_offset + LOCAL.size].tobytes()
    if len(head) < LOCAL.size or head[:4] != b"PK\3\4":
        raise ValueError(f"its entry {name!r} is not where the archive's list says")
    *_, name_size, extra_size = LOCAL.unpack(head)
    begin = entry.header_offset + LOCAL.size + name_size + extra_size
    if begin + entry.file_size > len(file):
        raise ValueError(f"its entry {name!r} reaches beyond the end of the file")
    return begin, begin + entry.file_size


def _array(contents: Mapping[str, np.ndarray], view: View) -> np.ndarray:
    """A tensor in the mapped file; `torch_pickle.read` has checked that it is in its storage."""
    storage = view.storage
    content = contents.get(f"data/{storage.key}")
    if content is None or len(content) != storage.size * storage.dtype.itemsize:
        raise ValueError(
            f"it has not the {storage.size} numbers of its storage {storage.key[:80]!r}"
        )
    numbers = content.view(storage.dtype)[view.offset :]
    strides = [stride * storage.dtype.itemsize for stride in view.strides]
    if 0 in view.shape:
        return np.empty(view.shape, storage.dtype)
    return np.lib.stride_tricks.as_strided(numbers, view.shape, strides, writeable=False)


class _Entry(NamedTuple):
    """An entry of the archive: where its header is, and how many bytes of content follow it."""

    name: str
    offset: int
    size: int

    @property
    def padding(self) -> int:
        """Bytes of the extra field that moves the content to a multiple of the alignment."""
        return -(self.offset + len(self.name) + UNPADDED) % ALIGNMENT

    @property
    def begin(self) -> int:
        return self.offset + len(self.name) + UNPADDED + self.padding

    @property
    def end(self) -> int:
        return self.begin + self.size

    def header(self, crc32: int) -> bytes:
        """What stands before the content."""
        sizes = struct.pack("<2H2Q", 1, 16, self.size, self.size)
        extra = sizes + struct.pack("<2sH", b"FB", self.padding) + b"Z" * self.padding
        fields = (NEEDED_VERSION, 0, 0, MIDNIGHT, FIRST_DAY, crc32, IN_64_BITS, IN_64_BITS)
        head = LOCAL.pack(b"PK\3\4", *fields, len(self.name), len(extra))
        return head + self.name.encode() + extra

    def listed(self, crc32: int) -> bytes:
        """Its line in the list at the end of the archive."""
        extra = struct.pack("<2H3Q", 1, 24, self.size, self.size, self.offset)
        fields = (NEEDED_VERSION, NEEDED_VERSION, 0, 0, MIDNIGHT, FIRST_DAY, crc32)
        sizes = (IN_64_BITS, IN_64_BITS, len(self.name), len(extra))
        head = CENTRAL.pack(b"PK\1\2", *fields, *sizes, 0, 0, 0, 0, IN_64_BITS)
        return head + self.name.encode() + extra


def plan_file(source: Source, names: Iterable[str], file: str) -> FlatFile:
    """A file of these tensors, in this order, that torch.load reads and maps."""
    tensors = {name: source.tensors[name] for name in names}
    contents = {PICKLE: torch_pickle.write(tensors), BYTE_ORDER: b"little", VERSION: b"3\n"}
    sizes = {name: len(content) for name, content in contents.items()}
    sizes |= {f"data/{key}": tensor.nbytes for key, tensor in enumerate(tensors.values())}
    entries = _laid_out(sizes)
    small, large = entries[: len(contents)], entries[len(contents) :]
    checksums = [zlib.crc32(content) for content in contents.values()]
    head = b"".join(
        entry.header(crc32) + content
        for entry, crc32, content in zip(small, checksums, contents.values(), strict=True)
    )
    places = {
        name: Place(entry.begin, entry.size) for name, entry in zip(tensors, large, strict=True)
    }

    def tail(records: Mapping[str, Record]) -> Iterator[tuple[int, bytes]]:
        later = [records[name]["crc32"] for name in tensors]
        for entry, crc32 in zip(large, later, strict=True):
            yield entry.offset, entry.header(crc32)
        yield entries[-1].end, _list(entries, checksums + later)

    size = entries[-1].end + len(_list(entries, [0] * len(entries)))
    return FlatFile(file, size, head, source, places, tail)


def _laid_out(sizes: Mapping[str, int]) -> list[_Entry]:
    entries, end = [], 0
    for name, size in sizes.items():
        entries.append(_Entry(ROOT + name, end, size))
        end = entries[-1].end
    return entries


def _list(entries: Sequence[_Entry], checksums: Sequence[int]) -> bytes:
    """The list of the entries, and how it is found from the end of the file."""
    lines = b"".join(map(_Entry.listed, entries, checksums))
    begin, count = entries[-1].end, len(entries)
    versions = (44, NEEDED_VERSION, NEEDED_VERSION)
    found = END_64.pack(b"PK\6\6", *versions, 0, 0, count, count, len(lines), begin)
    locator = LOCATOR.pack(b"PK\6\7", 0, begin + len(lines), 1)
    end = END.pack(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, IN_64_BITS, IN_64_BITS, 0)
    return lines + found + locator + end
