"""From records to batches on the devices: shuffled, mixed, repeatable and resumable (grain)."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from l32jax.data.samples import FIELDS, Batch, stack
from l32jax.errors import InputError
from l32jax.kernels.context import balanced_order
from l32jax.sharding import CONTEXT_AXIS, activation_spec

# Records by index: a list, an ArrayRecord source, anything with a length.
Source = Sequence[Any] | grain.sources.RandomAccessDataSource[Any]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources that are each shuffled and repeated for ever; `weights` are their shares of rows."""

    sources: Sequence[Source]
    weights: Sequence[float]

    def __post_init__(self):
        if len(self.sources) != len(self.weights) or min(self.weights, default=0) <= 0:
            raise InputError(
                f"mixture of {len(self.sources)} sources with weights {list(self.weights)}: "
                "each source needs a positive one"
            )


MakeRow = Callable[[Any, np.random.Generator], Batch]


def make_batches(
    source: Source | Mixture,
    *,
    make_row: MakeRow,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> "Batches":
    """This process's part of every batch: rows that depend on (seed, step) alone.

    Together the processes see the same batches whatever their number. A finite pass ends with a
    batch filled up with empty rows, so that each record is seen and every shape is the same.

    Args:
      make_row: of one record; its generator belongs to that record in that epoch.
      batch_size: rows of all processes together.
      num_epochs: None repeats for ever.
      prefetch: batches that one thread prepares ahead; 0 prepares them when asked.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size} must be a positive multiple of the {process_count} processes"
        )
    records = _records(source, seed, shuffle, num_epochs)
    rows = records.seed(seed).random_map(make_row)
    if num_epochs is not None:
        rows = _fill_up(rows, -len(rows) % batch_size)
    # Batches of local size, dealt out in turn: a process gets one block of each whole batch.
    local = rows.batch(batch_size // process_count, drop_remainder=True, batch_fn=stack)
    dataset = local.slice(slice(process_index, None, process_count)).to_iter_dataset(
        grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    )
    order = {"records": _count(source), "seed": seed, "shuffle": shuffle, "batch_size": batch_size}
    return Batches(dataset, order)


class Batches(Iterator[Batch]):
    """An iterator whose place can be saved; the place is the same on every process."""

    def __init__(self, dataset: grain.IterDataset, order: dict[str, Any]):
        self._iterator = iter(dataset)
        self._order = order

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> bytes:
        """JSON: how far it has come, and what the order of the records depends on."""
        return json.dumps({"place": self._iterator.get_state(), "order": self._order}).encode()

    def set_state(self, state: bytes) -> None:
        """Goes on where `get_state` was called; refuses the state of another order of records."""
        try:
            saved = json.loads(state)
            place, order = saved["place"], saved["order"]
        except (ValueError, TypeError, KeyError):
            raise _damaged_state() from None
        if order != self._order:
            raise InputError(
                f"data state in the checkpoint: it belongs to {order}, this run has {self._order}; "
                "restore the old settings or start the data afresh"
            )
        try:
            self._iterator.set_state(place)
        except (TypeError, KeyError, IndexError):
            raise _damaged_state() from None

    def close(self) -> None:
        """Stops the thread."""
        self._iterator.close()


def place(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays over all processes, each process giving its own rows, as activations are sharded.

    Where a mesh splits positions, rows are stored in an order that gives every device as much to
    attend to (`kernels.context.balanced_order`).
    """
    num_shards = mesh.shape[CONTEXT_AXIS]

    def put(name: str, local: np.ndarray) -> jax.Array:
        dims = FIELDS[name]
        if num_shards > 1 and "t" in dims:
            local = local[:, _balanced(local.shape[1], num_shards)]
        return jax.make_array_from_process_local_data(
            NamedSharding(mesh, activation_spec(dims)), local
        )

    return {name: put(name, local) for name, local in batch.items()}


def _balanced(length: int, num_shards: int) -> np.ndarray:
    if length % (2 * num_shards):
        raise InputError(
            f"length={length} of a row: a context axis of {num_shards} needs a multiple of "
            f"{2 * num_shards}"
        )
    return balanced_order(length, num_shards)


def _damaged_state() -> InputError:
    return InputError("data state in the checkpoint: damaged; use another checkpoint")


def _records(
    source: Source | Mixture, seed: int, shuffle: bool, num_epochs: int | None
) -> grain.MapDataset:
    if isinstance(source, Mixture):
        if num_epochs is not None:
            raise InputError("num_epochs of a mixture: its sources end at different times; drop it")
        seeds = np.random.SeedSequence(seed).generate_state(len(source.sources)).tolist()
        parts = [
            _records(part, part_seed, shuffle, None)
            for part, part_seed in zip(source.sources, seeds, strict=True)
        ]
        return grain.MapDataset.mix(parts, source.weights)
    if not len(source):
        raise InputError("records of a source: there are none; check its path and filters")
    records = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        records = records.shuffle()
    return records.repeat(num_epochs)


def _fill_up(rows: grain.MapDataset, count: int) -> grain.MapDataset:
    """Zeros are an empty row: they see nothing, are seen by nothing, and weigh nothing."""
    if not count:
        return rows

    def empty(_: int) -> Batch:
        example: Any = rows[0]
        return {name: np.zeros_like(array) for name, array in example.items()}

    return grain.MapDataset.concatenate([rows, grain.MapDataset.range(count).map(empty)])


def _count(source: Source | Mixture) -> Any:
    if isinstance(source, Mixture):
        return [[_count(part) for part in source.sources], list(source.weights)]
    return len(source)
