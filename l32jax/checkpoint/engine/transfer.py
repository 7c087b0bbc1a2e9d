"""Moves the tensors of a checkpoint of any size with little memory: some rows at a time, several
tensors side by side, each unit remembered once it is on the disk.
"""

import hashlib
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import ml_dtypes
import numpy as np

from l32jax.checkpoint.engine.buckets import BucketWorkplace
from l32jax.checkpoint.engine.folders import Folder, is_remote
from l32jax.checkpoint.engine.sources import Source, Tensor
from l32jax.checkpoint.engine.workplace import Record, Workplace
from l32jax.errors import InputError

SLAB_BYTES = 32 << 20  # of a tensor at a time
BLOCK_BYTES = 1 << 20  # of a slab, where a pass makes something of the same size
THREADS = 3  # two that compute, while one waits for the disk
EXPONENT = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}

Item = TypeVar("Item")
Told = Callable[[int], None]  # hears of bytes as they are moved


class Interrupted(Exception):
    """A conversion was asked to stop; what it has done so far is kept."""


class Unit(NamedTuple):
    """A part of the output that is written in one go, and again from its start after a kill.

    `write` returns when the bytes are on the disk, with what the manifest says of them:
    {"tensors": {name: {"sha256": ...}}, ...}.
    """

    name: str
    size: int
    write: Callable[[Told], Record]


@runtime_checkable
class Output(Protocol):
    """A checkpoint to be written.

    size: bytes of it all. single: the name of its one file, if it is not to be a folder.
    units: its parts, to be written below the workplace's directory.
    complete: adds what can only be written when all units are there; `records` are theirs.
    """

    @property
    def size(self) -> int: ...

    @property
    def single(self) -> str | None: ...

    def units(self, workplace: Workplace) -> list[Unit]: ...

    def complete(self, workplace: Workplace, records: Mapping[str, Record]) -> None: ...


@runtime_checkable
class Progress(Protocol):
    """Hears how far a long task is."""

    def begin(self, what: str, total: int) -> None: ...

    def advance(self, amount: int) -> None: ...


class Silent:
    """Progress that nobody looks at."""

    def begin(self, what: str, total: int) -> None: ...

    def advance(self, amount: int) -> None: ...


SILENT = Silent()


def write(
    output: Output,
    destination: str | Path,
    task: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    progress: Progress = SILENT,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Makes `output` the destination, whole or not at all.

    Args:
      destination: an address like s3://bucket/run is for an output that hands over its units.
      task: what identifies it: only the same is resumed. None: never, and nothing is left of it if
        it fails.
      check: is shown the path, or the address, before it is finished, and may raise.
    """
    with _workplace(destination, task, resume) as workplace:
        _run(output, workplace, progress)
        if check is not None:
            check(workplace.whole(output.single))
        workplace.finish(output.single)


def _workplace(destination: str | Path, task: Mapping[str, Any] | None, resume: bool) -> Workplace:
    if is_remote(destination):
        return BucketWorkplace(Folder.at(destination), task, resume=resume)
    return Workplace(Path(destination), task, resume=resume)


def _run(output: Output, workplace: Workplace, progress: Progress) -> None:
    """Writes what is missing, in threads; Ctrl-C ends it between two slabs."""
    workplace.require_room(output.size)
    units = output.units(workplace)
    progress.begin("writing", sum(unit.size for unit in units))
    missing = [unit for unit in units if unit.name not in workplace.done]
    progress.advance(sum(unit.size for unit in units if unit.name in workplace.done))

    def write(unit: Unit, told: Told) -> None:
        workplace.record(unit.name, unit.write(told))

    in_threads([(lambda told, unit=unit: write(unit, told)) for unit in missing], progress)
    output.complete(workplace, workplace.done)


def in_threads(tasks: Iterable[Callable[[Told], None]], progress: Progress) -> None:
    """Runs them all; the first exception, Ctrl-C included, stops the others at their next slab."""
    stop = threading.Event()

    def told(amount: int) -> None:
        if stop.is_set():
            raise Interrupted
        progress.advance(amount)

    with ThreadPoolExecutor(THREADS) as pool:
        futures: list[Future[None]] = []
        try:
            futures += [pool.submit(task, told) for task in tasks]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    for future in futures:
        if not future.cancelled() and not isinstance(future.exception(), Interrupted):
            future.result()


def slabs(tensor: Tensor) -> Iterator[slice]:
    """Rows of a tensor, in order, of at most SLAB_BYTES if its step allows it."""
    rows = tensor.shape[0]
    per_row = max(1, tensor.nbytes // max(rows, 1))
    size = max(1, SLAB_BYTES // (per_row * tensor.step)) * tensor.step
    yield from (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def runs(items: Iterable[Item], size: Callable[[Item], int], at_most: int) -> list[list[Item]]:
    """Consecutive items of at most so many bytes together, or one alone that has more."""
    found: list[list[Item]] = [[]]
    used = 0
    for item in items:
        if used + size(item) > at_most and found[-1]:
            found.append([])
            used = 0
        found[-1].append(item)
        used += size(item)
    return found


def read_slabs(source: Source, name: str) -> Iterator[np.ndarray]:
    """A tensor's rows, slab by slab. InputError if a value is not a finite number."""
    for rows in slabs(source.tensors[name]):
        values = source.read(name, rows)
        require_finite(values, name, source.where)
        yield values
        source.release()


def require_finite(values: np.ndarray, name: str, where: str) -> None:
    if not _finite(values):
        raise InputError(
            f"tensor {name!r} in {where}: it has NaN or infinite values; the checkpoint is "
            "damaged, or its training had diverged"
        )


def _finite(values: np.ndarray) -> bool:
    """Some rows at a time: what is computed of them stays in the processor's cache."""
    values = np.atleast_1d(values)
    step = max(1, BLOCK_BYTES * len(values) // max(values.nbytes, 1))
    return all(_all_finite(values[i : i + step]) for i in range(0, len(values), step))


def _all_finite(values: np.ndarray) -> bool:
    exponent = EXPONENT.get(values.dtype)
    if exponent is None:
        return bool(np.isfinite(values).all())
    if not values.size:
        return True
    bits = values.view(np.uint16) & np.uint16(exponent)  # several times as fast as isfinite
    return int(bits.max()) < exponent


class Checksums:
    """Of a stream of arrays: what a manifest says of a tensor's bytes."""

    def __init__(self, *, crc32: bool = False):
        self._sha256, self._crc32 = hashlib.sha256(), 0 if crc32 else None

    def update(self, content: np.ndarray) -> None:
        self._sha256.update(content.data)
        if self._crc32 is not None:
            self._crc32 = zlib.crc32(content.data, self._crc32)

    def record(self) -> Record:
        crc32 = {} if self._crc32 is None else {"crc32": self._crc32}
        return {"sha256": self._sha256.hexdigest(), **crc32}


def as_bytes(values: np.ndarray) -> np.ndarray:
    """The values' bytes in C order, without a copy where they lie so."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
