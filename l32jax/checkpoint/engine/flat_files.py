"""Files that are a head, tensors at places known beforehand, and maybe a tail: safetensors, GGUF,
torch's zip. Tensors are written in any order, by several threads, and again after a kill.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l32jax.checkpoint.engine.manifest import MANIFEST, rest_of, write_manifest
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.transfer import Checksums, Told, Unit, as_bytes, read_slabs
from l32jax.checkpoint.engine.workplace import Record, Workplace
from l32jax.errors import InputError


class Place(NamedTuple):
    """Where a tensor's bytes are in its file, and how its values become those bytes.

    `encode` takes rows of the source's values; its results, end to end, are `size` bytes.
    """

    offset: int
    size: int
    encode: Callable[[np.ndarray], np.ndarray] = lambda values: values


class FlatFile(NamedTuple):
    """A file to be written.

    source: has the tensors of `places`. head: its first bytes.
    tail: gives (offset, bytes) of what depends on the tensors' checksums, once they are known.
    """

    name: str
    size: int
    head: bytes
    source: Source
    places: Mapping[str, Place]
    tail: Callable[[Mapping[str, Record]], Iterable[tuple[int, bytes]]] | None = None


@dataclass(frozen=True)
class FlatFiles:
    """An `Output` of such files, and of small ones given whole.

    about: what the manifest says beside the tensors. single: see `Output`.
    """

    files: Sequence[FlatFile]
    about: Mapping[str, Any]
    small: Mapping[str, bytes] = field(default_factory=dict)
    single: str | None = None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files) + sum(map(len, self.small.values()))

    def units(self, workplace: Workplace) -> list[Unit]:
        for file in self.files:
            path = workplace.directory / file.name
            if workplace.done:
                _require_begun(file, path)
                continue
            with path.open("wb") as stream:
                stream.write(file.head)
                stream.truncate(file.size)
        return [
            Unit(f"{file.name}: {name}", place.size, _writer(file, name, workplace))
            for file in self.files
            for name, place in file.places.items()
        ]

    def complete(self, workplace: Workplace, records: Mapping[str, Record]) -> None:
        tensors, files = {}, {}
        for file in self.files:
            of_file = {name: records[f"{file.name}: {name}"] for name in file.places}
            if file.tail is not None:
                _patch(workplace, file.name, file.tail(of_file))
            for name, record in of_file.items():
                key = name if name not in tensors else f"{file.name}: {name}"
                place = file.places[name]
                where = {"file": file.name, "offset": place.offset, "bytes": place.size}
                tensors[key] = where | {"sha256": record["sha256"]}
            spans = [(place.offset, place.size) for place in file.places.values()]
            files[file.name] = rest_of(workplace.directory / file.name, spans)
        for name, content in self.small.items():
            (workplace.directory / name).write_bytes(content)
            files[name] = rest_of(workplace.directory / name, ())
        write_manifest(workplace.directory / MANIFEST, self.about, tensors, files)


def _require_begun(file: FlatFile, path: Path) -> None:
    """InputError unless what was written before is there yet: made anew, it would be zeros."""
    if path.is_file() and path.stat().st_size == file.size:
        with path.open("rb") as stream:
            if stream.read(len(file.head)) == file.head:
                return
    raise InputError(f"unfinished file {str(path)!r}: it was removed or changed since; begin again")


def _writer(file: FlatFile, name: str, workplace: Workplace) -> Callable[[Told], Record]:
    place = file.places[name]

    def write(told: Told) -> Record:
        checksums = Checksums(crc32=file.tail is not None)
        at = place.offset
        descriptor = os.open(workplace.directory / file.name, os.O_WRONLY)
        try:
            for values in read_slabs(file.source, name):
                content = as_bytes(place.encode(values))
                checksums.update(content)
                write_at(descriptor, content, at)
                at += len(content)
                told(len(content))
            assert at == place.offset + place.size, name
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        return checksums.record()

    return write


def write_at(descriptor: int, content: Any, offset: int) -> None:
    view = memoryview(content)
    while len(view):  # one call writes at most 2 GiB
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _patch(workplace: Workplace, name: str, patches: Iterable[tuple[int, bytes]]) -> None:
    descriptor = os.open(workplace.directory / name, os.O_WRONLY)
    try:
        for offset, content in patches:
            write_at(descriptor, content, offset)
    finally:
        os.close(descriptor)
