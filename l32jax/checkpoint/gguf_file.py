"""The container of llama.cpp's models: metadata, and where each tensor's bytes are.

Written out here, since the reader of the package `gguf` takes seconds to minutes over a
vocabulary, and believes any length that a damaged header names. (llama.cpp, `docs/gguf.md`.)
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from l32jax.errors import InputError

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

Value = TypeVar("Value")


class Tensor(NamedTuple):
    """`shape` has the fastest dimension last, as numpy's; `kind` is a quantisation's number."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class File(NamedTuple):
    path: Path
    content: np.ndarray
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def bytes_of(self, name: str, rows_of_bytes: tuple[int, ...]) -> np.ndarray:
        """The stored bytes of a tensor, in that shape. InputError if the file ends before."""
        begin = self.tensors[name].offset
        end = begin + math.prod(rows_of_bytes)
        if end > len(self.content):
            raise InputError(f"tensor {name!r} in {self.path}: the file ends early; copy it again")
        return self.content[begin:end].reshape(rows_of_bytes)


def read(path: str | os.PathLike) -> File:
    """The header of a file, whose tensors stay on disk. InputError if it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"GGUF file {path}: there is no such file")
    try:
        # An empty file cannot be mapped.
        whole = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else []
        content = np.asarray(whole, np.uint8)
        return File(path, content, *_Header(content).read())
    except (ValueError, OSError) as error:
        raise InputError(f"GGUF file {path}: {error}; download it again") from None


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
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        begin = -(-self.at // alignment) * alignment
        return metadata, {k: t._replace(offset=begin + t.offset) for k, t in tensors.items()}

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

    def string(self) -> str:
        length = int.from_bytes(self.take(8).tobytes(), "little")
        return self.take(length).tobytes().decode()

    def named(self, count: int, read_value: Callable[[], Value]) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for _ in range(count):
            name = self.string()
            if name in values:
                raise ValueError(f"{name[:60]!r} is there twice")
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

    def tensor(self) -> Tensor:
        num_dims = int(self.scalar(np.uint32))
        if not 1 <= num_dims <= MAX_DIMS:
            raise ValueError(f"a tensor has {num_dims} dimensions")
        shape = tuple(int(self.scalar(np.uint64)) for _ in range(num_dims))
        return Tensor(shape[::-1], int(self.scalar(np.uint32)), int(self.scalar(np.uint64)))
