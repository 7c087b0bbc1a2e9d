"""From streams of rows to batches on the devices: repeatable, resumable, counted."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from l32jax.data.records import too_many_bad
from l32jax.data.rows import FIELDS, Batch, stack
from l32jax.data.streams import Row, Rows, Source, damaged_state, in_turn, make_streams
from l32jax.errors import InputError
from l32jax.kernels.context import balanced_order
from l32jax.sharding import CONTEXT_AXIS, activation_spec, row_share

logger = logging.getLogger(__name__)

LOGGED_PLACES = 100


def make_batches(
    sources: Sequence[Source],
    weights: Sequence[float],
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    max_bad: float = 0.0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
) -> "Batches":
    """This process's part of every batch, which depends on (seed, step) alone.

    Together the processes see the same batches whatever their number.

    Args:
      weights: shares of samples that come from each source.
      batch_size: rows of all processes together.
      max_bad: share of records that may be unusable, of those that this process has seen.
      workers: processes that make rows; 0 for one thread.
      prefetch: batches that are ready ahead.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size} must be a positive multiple of the {process_count} processes"
        )
    streams = make_streams(sources, weights, rows, count=batch_size, seed=seed)
    local = batch_size // process_count
    mine = range(process_index * local, (process_index + 1) * local)

    def open_from(places: Mapping[int, str]) -> grain.IterDataset:
        turns = in_turn({number: streams[number] for number in mine}, places, workers=workers)
        return grain.experimental.ThreadPrefetchIterDataset(
            turns.batch(local, drop_remainder=True, batch_fn=_assembled),
            prefetch_buffer_size=prefetch,
        )

    order = {
        "records": [len(source) for source in sources],
        "weights": list(weights),
        "seed": seed,
        "batch_size": batch_size,
        "packing": rows.packing,
        "open_rows": rows.open_rows,
        "row": [*rows.shape.size[:3], *([pairs] if (pairs := rows.shape.size.pairs) else [])],
    }
    return Batches(open_from, mine, order, max_bad)


class _Assembled(NamedTuple):
    batch: Batch
    places: dict[int, str]
    used: int
    bad: list[tuple[str, str]]


def _assembled(rows: Sequence[Row]) -> _Assembled:
    return _Assembled(
        batch=stack([row["arrays"] for row in rows]),
        places={int(row["stream"]): row["place"] for row in rows},
        used=sum(int(row["used"]) for row in rows),
        bad=[(place, why) for row in rows for place, why in row["bad"]],
    )


class Batches(Iterator[Batch]):
    """An iterator whose place can be saved, and gone on from by any number of processes.

    Attributes:
      used, bad: samples given out, and records skipped, by this process since the run began.
      policy: the parameters of the model that learns from them, which these do not depend on.
    """

    policy: Any = None

    def __init__(
        self,
        open_from: Callable[[Mapping[int, str]], grain.IterDataset],
        streams: Sequence[int],
        order: dict[str, Any],
        max_bad: float,
    ):
        self._open_from, self._streams = open_from, streams
        self._order: dict[str, Any] = json.loads(json.dumps(order))
        self._max_bad = max_bad
        self._places: dict[int, str] = {}
        self._iterator: grain.DatasetIterator | None = None
        self._logged: set[str] = set()
        self.used = self.bad = 0

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._open_from(self._places))
        found = next(self._iterator)
        self._places |= found.places
        self._count(found)
        return found.batch

    def get_state(self) -> bytes:
        """JSON: where each stream goes on, and what the order of the records depends on."""
        counts = {"used": self.used, "bad": self.bad}
        state = {"streams": self._places, "order": self._order, "counts": counts}
        return json.dumps(state).encode()

    def set_state(self, states: Sequence[bytes]) -> None:
        """Goes on where all processes were when they called `get_state`; refuses another order."""
        places: dict[int, str] = {}
        used = bad = 0
        for state in states:
            found, counts = _read_state(state, self._order)
            places |= found
            used, bad = used + counts["used"], bad + counts["bad"]
        if places and not places.keys() >= set(self._streams):
            raise damaged_state()
        self.close()
        self._places = {number: places[number] for number in self._streams} if places else {}
        share = len(self._streams) / self._order["batch_size"]
        self.used, self.bad = round(used * share), round(bad * share)

    def close(self) -> None:
        """Stops threads and workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _count(self, found: _Assembled) -> None:
        self.used += found.used
        self.bad += len(found.bad)
        for place, why in found.bad:
            self._log(place, why)
        total = self.used + self.bad
        if found.bad and too_many_bad(self.bad, total, self._max_bad):
            place, why = found.bad[-1]
            raise InputError(
                f"{self.bad} of {total} records are unusable, the last {place}: {why}; mend the "
                f"data, or let max_bad={self._max_bad} allow it"
            )

    def _log(self, place: str, why: str) -> None:
        if place in self._logged or len(self._logged) > LOGGED_PLACES:
            return
        self._logged.add(place)
        if len(self._logged) > LOGGED_PLACES:
            logger.warning("more than %d records are unusable: others are not told", LOGGED_PLACES)
        else:
            logger.warning("skipped %s: %s", place, why)


def _read_state(state: bytes, order: dict[str, Any]) -> tuple[dict[int, str], dict[str, int]]:
    try:
        saved = json.loads(state)
        places = {int(number): str(place) for number, place in saved["streams"].items()}
        counts, was = saved["counts"], saved["order"]
        counts = {name: int(counts[name]) for name in ("used", "bad")}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged_state() from None
    if was != order:
        changed = ", ".join(
            f"{name}={order[name]} was {was.get(name)}"
            for name in order
            if order[name] != was.get(name)
        )
        raise InputError(
            f"data state in the checkpoint: it belongs to another order of records ({changed}); "
            "restore the old settings or start the data afresh"
        )
    return places, counts


def place(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays over all processes, each process giving its share of rows, as activations are sharded.

    Where a mesh splits positions, rows are stored in an order that gives every device as much to
    attend to (`kernels.context.balanced_order`).
    """
    num_shards = mesh.shape[CONTEXT_AXIS]
    _, shares = row_share(mesh)

    def put(name: str, local: np.ndarray) -> jax.Array:
        dims = FIELDS[name]
        if num_shards > 1 and "t" in dims:
            local = local[:, _balanced(local.shape[1], num_shards)]
        return jax.make_array_from_process_local_data(
            NamedSharding(mesh, activation_spec(dims)),
            local,
            (shares * local.shape[0], *local.shape[1:]),
        )

    return {name: put(name, local) for name, local in batch.items()}


def own_rows(array: jax.Array) -> np.ndarray:
    """Of an array whose rows are placed like those of a batch, those of this process, in order."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _balanced(length: int, num_shards: int) -> np.ndarray:
    if length % (2 * num_shards):
        raise InputError(
            f"length={length} of a row: a context axis of {num_shards} needs a multiple of "
            f"{2 * num_shards}"
        )
    return balanced_order(length, num_shards)
