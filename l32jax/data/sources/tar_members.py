"""Where the members of a tar file lie, by its headers alone; what is damaged is skipped."""

import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from l32jax.data.files import File
from l32jax.errors import InputError

BLOCK = tarfile.BLOCKSIZE
MAGIC, MAGIC_AT = b"ustar", 257  # in every header since 1988
BUFFER_BYTES = 1 << 20
MAX_NAME_BYTES = 64 << 10  # of headers that hold the name of the next one
MAX_GAP_BYTES = 1 << 30  # without any header: then it is no tar file


class Member(NamedTuple):
    """A file in the tar file: its name, and its content's place and size."""

    name: str
    offset: int
    size: int


def members(file: File) -> Iterator[Member | None]:
    """All of them in order; None where something between them could not be read.

    Links, folders and devices are passed over: nothing is ever followed or unpacked.
    """
    blocks = _Blocks(file)
    offset, long_name, in_gap = 0, None, 0
    while offset + BLOCK <= file.size:
        header = blocks.at(offset)
        if not header.strip(b"\0"):  # ends the file, or one of several put together
            offset += BLOCK
            continue
        member = _member(header, offset, file.size)
        if member is None:
            in_gap = _widened(in_gap, file)
            offset += BLOCK
            continue
        if in_gap:
            yield None
        in_gap, kind = 0, header[156:157]
        content = member.offset, member.size
        offset = member.offset + -(-member.size // BLOCK) * BLOCK
        if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            long_name = _long_name(kind, blocks.read(*content)) or long_name
        elif kind in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield member._replace(name=long_name or member.name)
            long_name = None
        elif kind not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            long_name = None
    if in_gap or offset > file.size:
        yield None


class _Blocks:
    """Reads ahead, as headers of small members lie close together."""

    def __init__(self, file: File):
        self._file, self._start, self._data = file, 0, b""

    def at(self, offset: int) -> bytes:
        begin = offset - self._start
        if not 0 <= begin <= len(self._data) - BLOCK:
            size = min(BUFFER_BYTES, self._file.size - offset)
            self._start, self._data, begin = offset, self._file.read(offset, size), 0
        return self._data[begin : begin + BLOCK]

    def read(self, offset: int, size: int) -> bytes:
        return self._file.read(offset, min(size, MAX_NAME_BYTES))


def _member(header: bytes, offset: int, file_size: int) -> Member | None:
    """None if it is no header, or its member would reach beyond the file."""
    if header[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
        return None
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    if not 0 <= found.size <= file_size - offset - BLOCK:
        return None
    return Member(found.name, offset + BLOCK, found.size)


def _widened(gap: int, file: File) -> int:
    if gap > MAX_GAP_BYTES:
        raise InputError(
            f"source {file.where}: {gap} bytes of it are no tar file; unpack it if it is "
            "compressed, or copy it again"
        )
    return gap + BLOCK


def _long_name(kind: bytes, content: bytes) -> str | None:
    """GNU's content is the name; that of POSIX has lines "length key=value"."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while content:
        length, space, _ = content.partition(b" ")
        if not (space and length.isdigit() and len(length) < 6 and int(length)):
            return None
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return None
