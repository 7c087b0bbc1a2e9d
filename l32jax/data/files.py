"""Files of data sets on a disk or in a bucket, gs://bucket/key or s3://bucket/key: found and read.

A file is opened for each read: that costs microseconds on a disk and nothing in a bucket, and so
there is nothing open to share between threads, to pickle, or to run out of. Buckets are read by
pyarrow. Credentials are what the clouds' own tools use; AWS_ENDPOINT_URL names an S3-compatible
server, TENSORSTORE_GCS_HTTP_URL one that stands in for GCS, as for checkpoints.
"""

import dataclasses
import fcntl
import fnmatch
import functools
import glob
import hashlib
import os
import posixpath
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from l32jax.errors import InputError, one_line

SCHEMES = ("gs", "s3")
MAX_TROUBLE = timedelta(seconds=30)  # of a bucket; then reading has failed
WILDCARDS = frozenset("*?[")
BLOCK_BYTES = 8 << 20
MAX_READ = 1 << 30  # of one call; the system itself stops at 2 GiB


@dataclasses.dataclass(frozen=True)
class File:
    """Where it is, how large, and when it was last written, in nanoseconds."""

    where: str
    size: int
    written: int

    @property
    def name(self) -> str:
        return posixpath.basename(self.where)

    @property
    def folder(self) -> str:
        return posixpath.dirname(self.where)

    def read(self, offset: int, size: int) -> bytes:
        """That many bytes from there on.

        Raises:
          InputError: the file has gone, or has become shorter.
          OSError: it cannot be read now; nothing is known to be wrong with what it holds.
        """
        assert 0 <= offset <= offset + size <= self.size, (self, offset, size)
        try:
            if is_remote(self.where):
                data = _opened(self).read_at(size, offset)
            else:
                data = _read_local(self.where, offset, size)
        except FileNotFoundError:
            raise InputError(f"file {self.where!r}: it has gone; put it back") from None
        if len(data) != size:
            raise InputError(f"file {self.where!r}: it ends early; copy it again")
        return data

    def blocks(self) -> Iterator[bytes]:
        """All of it, in pieces."""
        for offset in range(0, self.size, BLOCK_BYTES):
            yield self.read(offset, min(BLOCK_BYTES, self.size - offset))

    def for_arrow(self) -> Any:
        """What pyarrow reads: a path, or an open file of a bucket."""
        return _opened(self) if is_remote(self.where) else self.where


def is_remote(where: str) -> bool:
    scheme, colon, _ = where.partition("://")
    return bool(colon) and scheme in SCHEMES


def find_files(name: str) -> list[File]:
    """The file of that name; those that a pattern such as "shards/*.tar" fits; or those directly in
    a folder, without hidden ones. Sorted. InputError if there are none, or they cannot be reached.
    """
    try:
        found = _find_remote(name) if is_remote(name) else _find_local(name)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"files {name!r}: {one_line(error)}; check the name") from None
    if not found:
        raise InputError(f"files {name!r}: there are none; check the path")
    return sorted(found, key=lambda file: file.where)


def read_beside(folder: str, name: str, at_most: int) -> bytes | Path:
    """A file below a folder: its path on this machine, or its content if it is in a bucket.

    InputError if the name leads out of the folder; for a bucket also if there is none such, or it
    is larger.
    """
    if is_remote(folder):
        return _read_remote(folder, name, at_most)
    try:
        path = Path(os.path.realpath(os.path.join(folder, name)))
        is_inside = path.is_relative_to(_real(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"file {name!r} in {folder}: {one_line(error)}; rename it") from None
    if not is_inside:
        raise _outside(folder, name)
    return path


@functools.lru_cache(maxsize=1024)
def _real(folder: str) -> Path:
    return Path(os.path.realpath(folder))


def _read_remote(folder: str, name: str, at_most: int) -> bytes:
    where = posixpath.normpath(posixpath.join(_path(folder), name))
    if not where.startswith(f"{_path(folder)}/"):
        raise _outside(folder, name)
    file = _remote_file(f"{folder}/{posixpath.relpath(where, _path(folder))}")
    if file is None:
        raise InputError(f"file {name!r} in {folder}: no such file; check the name")
    if file.size > at_most:
        raise InputError(f"file {name!r} in {folder}: more than {at_most} bytes; shrink it")
    return file.read(0, file.size)


def _outside(folder: str, name: str) -> InputError:
    return InputError(f"file {name!r} in {folder}: it lies outside the folder; move it there")


def local_copy(file: File) -> Path:
    """The file itself, or a copy in the cache of what is in a bucket; kept until it is deleted.

    The cache is XDG_CACHE_HOME/l32jax, by default ~/.cache/l32jax.
    """
    if not is_remote(file.where):
        return Path(file.where)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "l32jax" / "data"
    identity = f"{file.where} {file.size} {file.written}"
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}-{file.name}"
    cache.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait, and find it done
        if not path.is_file() or path.stat().st_size != file.size:
            _download(file, path)
    return path


def _download(file: File, path: Path) -> None:
    free = shutil.disk_usage(path.parent).free
    if file.size > free:
        raise InputError(
            f"copy of {file.where} in {path.parent}: {file.size} bytes and {free} free; "
            "set XDG_CACHE_HOME to where there is room"
        )
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as copy:
        for block in file.blocks():
            copy.write(block)
    unfinished.replace(path)


def _read_local(path: str, offset: int, size: int) -> bytes:
    pieces = []
    with open(path, "rb", buffering=0) as file:
        while size and (piece := os.pread(file.fileno(), min(size, MAX_READ), offset)):
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
    return b"".join(pieces)


@functools.lru_cache(maxsize=64)  # opening asks for the size once more
def _opened(file: File) -> Any:
    return _system(file.where).open_input_file(_path(file.where))


def _find_local(name: str) -> list[File]:
    if os.path.isdir(name):
        names = [os.path.join(name, entry) for entry in os.listdir(name) if entry[0] != "."]
    else:
        names = [name] if os.path.exists(name) else glob.glob(name)
    # pipes and devices might never end
    return [_local_file(path) for path in names if os.path.isfile(path)]


def _local_file(path: str) -> File:
    status = os.stat(path)
    return File(os.path.abspath(path), status.st_size, status.st_mtime_ns)


def _find_remote(name: str) -> list[File]:
    if file := _remote_file(name):
        return [file]
    from pyarrow import fs

    pattern = name.rstrip("/")
    if not WILDCARDS.intersection(pattern):
        pattern += "/[!.]*"
    steps = pattern.split("/")
    fixed = next(i for i, step in enumerate(steps) if WILDCARDS.intersection(step))
    below = fs.FileSelector(
        _path("/".join(steps[:fixed])), recursive=fixed < len(steps) - 1, allow_not_found=True
    )
    found = [_file_of(name, info) for info in _system(name).get_file_info(below) if info.is_file]
    return [file for file in found if _fits(file.where.split("/"), steps)]


def _fits(steps: list[str], pattern: list[str]) -> bool:
    return len(steps) == len(pattern) and all(map(fnmatch.fnmatchcase, steps, pattern))


def _remote_file(where: str) -> File | None:
    info = _system(where).get_file_info(_path(where))
    return _file_of(where, info) if info.is_file else None


def _file_of(where: str, info: Any) -> File:
    return File(f"{urlsplit(where).scheme}://{info.path}", info.size, info.mtime_ns or 0)


def _path(where: str) -> str:
    """What pyarrow calls it: the bucket and the key."""
    return where.partition("://")[2].strip("/")


def _system(where: str) -> Any:
    return _file_system(where.partition("://")[0])


@functools.cache
def _file_system(scheme: str) -> Any:
    try:
        from pyarrow import fs
    except ImportError:
        raise InputError(
            "data in a bucket: the package pyarrow is not installed; run pip install 'l32jax[data]'"
        ) from None
    variable = "AWS_ENDPOINT_URL" if scheme == "s3" else "TENSORSTORE_GCS_HTTP_URL"
    server = urlsplit(os.environ.get(variable, ""))
    options = {"scheme": server.scheme, "endpoint_override": server.netloc} if server.netloc else {}
    if scheme == "s3":
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return fs.S3FileSystem(region=region or ("us-east-1" if server.netloc else None), **options)
    return fs.GcsFileSystem(anonymous=bool(server.netloc), retry_time_limit=MAX_TROUBLE, **options)
