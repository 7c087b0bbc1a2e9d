"""The arrays of our own format, written by the chunk through tensorstore.

Each unit is a run of consecutive slices in an OCDBT of its own, `state/ocdbt.process_N`, like those
of the processes of a training run; in the end they get one root by reference, as Orbax does it.
"""

import json
import math
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from l32jax.checkpoint.engine import digests
from l32jax.checkpoint.engine.folders import Folder, fresh_context
from l32jax.checkpoint.engine.slices import ALL, Home, Shape, Slices
from l32jax.checkpoint.engine.transfer import Checksums, Told, as_bytes, require_finite, runs
from l32jax.checkpoint.engine.workplace import Record
from l32jax.checkpoint.native_read import DTYPES, METADATA, PARAMS

CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"  # of times and metrics; Orbax warns if it is missing
UNIT_BYTES = 256 << 20
CHUNK_BYTES = 32 << 20
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_NODE_BYTES = 100_000_000  # of the root, as in Orbax


def units_of(slices: Slices) -> list[list[Home]]:
    """What is written together: consecutive homes."""
    return runs(slices.homes(), slices.nbytes, UNIT_BYTES)


def chunk_of(shape: Shape, itemsize: int) -> Shape:
    """Rows of a slice, about as many in each chunk; a last one that is shorter is padded."""
    if not shape:
        return ()
    size = math.prod(shape) * itemsize
    fewest = min(shape[0], max(1, -(-size // CHUNK_BYTES)))
    even = (count for count in range(fewest, 2 * fewest) if shape[0] % count == 0)
    return (-(-shape[0] // next(even, fewest)), *shape[1:])


def _rows(shape: Shape, itemsize: int) -> Iterator[slice]:
    if not shape:
        yield ALL
        return
    step = chunk_of(shape, itemsize)[0]
    yield from (slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step))


def write_unit(slices: Slices, homes: Sequence[Home], directory: Path, told: Told) -> Record:
    """Anew, what a killed one has left is removed; when it returns all is on the disk.

    The record has the values' checksums by `params/path[layer]`, the files' by their names below
    the directory. InputError if a value is not a finite number.
    """
    shutil.rmtree(directory, ignore_errors=True)
    with closing(_Writer(slices, directory)) as writer:
        tensors = {f"{PARAMS}{home}": writer.write(home, told) for home in homes}
        writer.finish()
    return {"tensors": tensors, "files": _digests(directory)}


class _Writer:
    """Of one unit; the next chunk is read and hashed while the last one is written."""

    def __init__(self, slices: Slices, directory: Path):
        self._slices, self._folder = slices, Folder.at(directory)
        self._store = {"driver": "ocdbt", "base": self._folder.base}
        self._context = fresh_context()
        self._arrays: dict[str, ts.TensorStore] = {}
        self._pending: deque[tuple[ts.WriteFutures, int]] = deque()

    def write(self, home: Home, told: Told) -> Record:
        """What the manifest says of it. InputError if a value is not a finite number."""
        array, checksums = self._array(home), Checksums()
        shape, dtype = self._slices.shape(home), self._slices.dtypes[home.path]
        for rows in _rows(shape, dtype.itemsize):
            values = np.asarray(self._slices.read(home, rows), dtype)
            require_finite(values, str(home), self._slices.where)
            checksums.update(as_bytes(values))
            self._send(array[rows] if shape else array, values)
            told(values.nbytes)
        return {"shape": list(shape), "dtype": dtype.name, **checksums.record()}

    def finish(self) -> None:
        """The last commit has no data, so that the root of the unit is in a small file."""
        self._wait(0)
        header = f"{PARAMS}{next(iter(self._arrays))}/.zarray"
        with self._folder.writing():
            store = ts.KvStore.open(self._store, context=self._context).result()
            store.write(header, store.read(header).result().value).result()

    def close(self) -> None:
        """Returns when nothing is written any more, also after a failure: all may be removed."""
        for future, _ in self._pending:
            future.commit.exception()

    def _array(self, home: Home) -> ts.TensorStore:
        if home.path not in self._arrays:
            self._arrays[home.path] = self._create(home)
        array = self._arrays[home.path]
        return array if home.layer is None else array[home.layer]

    def _create(self, home: Home) -> ts.TensorStore:
        dtype = self._slices.dtypes[home.path]
        chunk = chunk_of(self._slices.shape(home), dtype.itemsize)
        spec = {
            "driver": "zarr",
            "kvstore": {**self._store, "path": f"{PARAMS}{home.path}/"},
            "metadata": {
                "shape": list(self._slices.shapes[home.path]),
                "chunks": list(chunk if home.layer is None else (1, *chunk)),
                "dtype": NAMES[dtype],
                "compressor": None,  # bfloat16 weights hardly get smaller
                "fill_value": None,
            },
            "store_data_equal_to_fill_value": True,
        }
        with self._folder.writing():
            return ts.open(spec, create=True, context=self._context).result()

    def _send(self, target: ts.TensorStore, values: np.ndarray) -> None:
        future = target.write(values, can_reference_source_data_indefinitely=True)
        self._pending.append((future, values.nbytes))
        self._wait(CHUNK_BYTES)

    def _wait(self, allowed: int) -> None:
        """Until no more than so many bytes are on their way to the disk."""
        with self._folder.writing():
            while sum(size for _, size in self._pending) > allowed:
                self._pending.popleft()[0].result()
        self._slices.release()


def _digests(directory: Path) -> dict[str, str]:
    """Of what was just written, and is in memory yet."""
    found = {}
    for path in [*directory.rglob("*"), directory]:
        digests.sync(path)
        if path.is_file():
            found[path.relative_to(directory).as_posix()] = digests.digest(path)
    return found


def merge(state: Path, units: Iterable[str]) -> None:
    """One root for them all, which refers to their data; what a killed one has left is removed."""
    (state / "manifest.ocdbt").unlink(missing_ok=True)
    shutil.rmtree(state / "d", ignore_errors=True)
    context = fresh_context()

    def opened(directory: Path, **how: Any) -> ts.KvStore:
        spec = {"driver": "ocdbt", "base": Folder.at(directory).base, **how}
        return ts.KvStore.open(spec, context=context).result()

    with Folder.at(state).writing():
        root = opened(state, config={"max_decoded_node_bytes": MAX_NODE_BYTES})
        transaction = ts.Transaction(atomic=True)
        for unit in units:
            part = opened(state / unit)
            part.experimental_copy_range_to(root.with_transaction(transaction)).result()
        transaction.commit_async().result()


def write_metadata(state: Path, names: Iterable[str]) -> None:
    """What Orbax has to know of the arrays before it looks at them.

    An np.ndarray can be restored as it is; of a jax.Array it would want to know the devices.
    """
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    content = {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (state / METADATA).write_text(json.dumps(content), encoding="utf-8")
    (state / CHECKPOINT_METADATA).write_text("{}", encoding="utf-8")
