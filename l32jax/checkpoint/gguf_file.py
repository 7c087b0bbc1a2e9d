"""The container of llama.cpp's models: metadata, and where each tensor's bytes are.

Written out here, since the reader of the package `gguf` takes seconds to minutes over a
vocabulary, and believes any length that a damaged header names. (llama.cpp, `docs/gguf.md`.)
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from l32jax.checkpoint.engine.mapped import Mapped
from l32jax.checkpoint.gguf_kinds import Kind, numbered
from l32jax.config_text import short
from l32jax.errors import InputError, one_line

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # of tensors, unless the metadata says otherwise
STRING, ARRAY = 8, 9
SCALARS = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    7: np.bool_,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}
MAX_DIMS, MAX_ENTRIES, MAX_STRINGS = 4, 2**16, 2**21  # the last: eight times Llama's vocabulary
MAX_NAME, MAX_ALIGNMENT = 512, 2**20  # bytes

Value = TypeVar("Value")


class Tensor(NamedTuple):
    """`shape` has the fastest dimension last, as numpy's; `offset` is from the file's begin."""

    shape: tuple[int, ...]
    kind: Kind
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.kind.nbytes(self.shape)


class File(NamedTuple):
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    mapped: Mapped

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a tensor's first dim, unpacked: no others are touched, unless it has one dim."""
        tensor = self.tensors[name]
        stored = self.mapped.content[tensor.offset : tensor.end]
        if len(tensor.shape) == 1:  # its blocks reach over several rows
            return tensor.kind.unpack(stored)[rows]
        return tensor.kind.unpack(stored.reshape(*tensor.shape[:-1], -1)[rows])


def read(path: str | os.PathLike) -> File:
    """The header of a file, whose tensors stay on disk.

    InputError if it is damaged, or if a tensor is not where and what one can be.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"GGUF file {path}: there is no such file")
    try:
        mapped = Mapped(path)
        return File(path, *_Header(mapped.content).read(), mapped)
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(f"GGUF file {path}: {one_line(error)}; download it again") from None


class _Header:
    """Reads forwards through the little-endian header. ValueError for anything irregular."""

    def __init__(self, content: np.ndarray):
        self.content, self.at = content, 0

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.take(4).tobytes() != MAGIC:
            raise ValueError("it does not begin as a GGUF file does")
        version = int(self.scalar(np.uint32))
        if version not in VERSIONS:
            raise ValueError(f"version {version} is none of {VERSIONS}, or it is big-endian")
        num_tensors, num_keys = self.count(MAX_ENTRIES), self.count(MAX_ENTRIES)
        metadata = self.named(num_keys, self.value)
        tensors = self.named(num_tensors, self.tensor)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT:
            raise ValueError(f"general.alignment is {short(alignment)}")
        begin = -(-self.at // alignment) * alignment
        return metadata, _placed(tensors, begin, len(self.content), alignment)

    def take(self, size: int) -> np.ndarray:
        part = self.content[self.at : self.at + size]
        if len(part) != size:
            raise ValueError("it ends early")
        self.at += size
        return part

    def scalar(self, dtype: Any) -> Any:
        return self.take(np.dtype(dtype).itemsize).view(dtype)[0]

    def count(self, at_most: int) -> int:
        number = int(self.scalar(np.uint64))
        if number > at_most:
            raise ValueError(f"it has a count of {number} where {at_most} is much already")
        return number

    def string(self, at_most: int | None = None) -> str:
        length = self.count(len(self.content) if at_most is None else at_most)
        return self.take(length).tobytes().decode()

    def named(self, count: int, read_value: Callable[[], Value]) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for _ in range(count):
            name = self.string(MAX_NAME)
            if name in values:
                raise ValueError(f"{name!r} is there twice")
            values[name] = read_value()
        return values

    def value(self) -> Any:
        kind = int(self.scalar(np.uint32))
        return self.array() if kind == ARRAY else self.item(kind)

    def item(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        return self.scalar(self.dtype(kind)).item()

    def array(self) -> list[str] | np.ndarray:
        kind = int(self.scalar(np.uint32))
        if kind == STRING:
            return [self.string() for _ in range(self.count(MAX_STRINGS))]
        dtype = np.dtype(self.dtype(kind))
        return self.take(self.count(len(self.content)) * dtype.itemsize).view(dtype)

    def dtype(self, kind: int) -> Any:
        if kind not in SCALARS:
            raise ValueError(f"its metadata has a value of unknown kind {kind}")
        return SCALARS[kind]

    def tensor(self) -> "_Entry":
        num_dims = int(self.scalar(np.uint32))
        if not 1 <= num_dims <= MAX_DIMS:
            raise ValueError(f"a tensor has {num_dims} dimensions")
        shape = tuple(int(self.scalar(np.uint64)) for _ in range(num_dims))
        return _Entry(shape[::-1], int(self.scalar(np.uint32)), int(self.scalar(np.uint64)))


class _Entry(NamedTuple):
    """A tensor as the header has it; `offset` is from where tensors begin."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def _placed(entries: dict[str, _Entry], begin: int, size: int, alignment: int) -> dict[str, Tensor]:
    """Tensors in a file of `size` bytes. ValueError if one is crooked, or two overlap."""
    kinds = {number: numbered(number) for number in {entry.kind for entry in entries.values()}}
    tensors = {
        name: Tensor(entry.shape, kinds[entry.kind], begin + entry.offset)
        for name, entry in entries.items()
    }
    end = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if not all(tensor.shape) or tensor.shape[-1] % tensor.kind.block:
            raise ValueError(
                f"tensor {name!r} of shape {list(tensor.shape)} cannot be {tensor.kind.name}"
            )
        if (tensor.offset - begin) % alignment:
            raise ValueError(f"tensor {name!r} does not begin at a multiple of {alignment}")
        if tensor.offset < end:
            raise ValueError(f"tensor {name!r} overlaps the one before it")
        end = tensor.end
        if end > size:
            raise ValueError(f"it ends early, inside of tensor {name!r}")
    return tensors
