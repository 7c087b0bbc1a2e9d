"""Endless streams of packed rows: one for each row of the batches of a run (grain).

The records of a mixture, shuffled and repeated, are dealt out to as many streams as a batch has
rows, and every stream packs its own. What a stream holds at a step so depends on nothing but the
seed: not on the number of processes, of workers, or on who was killed on the way.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import absl.flags
import grain
import numpy as np

from l32jax.data.features import Features
from l32jax.data.packing import Packing, RowShape, fit, pack
from l32jax.data.records import Bad
from l32jax.data.rows import Batch, make_row
from l32jax.data.samples import Sample
from l32jax.errors import InputError

# Samples by index, where reading one may find it unusable.
Source = Sequence[Sample | Bad]
Change = Callable[[Sample, np.random.Generator], Sample]

HOPELESS = 1000  # unusable records in a row: there will be no usable one
READ_WHEN_ASKED = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Row(TypedDict):
    """A row on its way to a batch; arrays and text only, which travel well between processes.

    place: JSON, where its stream goes on after it.
    bad: what was skipped since the row before, as (place, why).
    """

    arrays: Batch
    stream: int
    place: str
    used: int
    bad: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What is done with a mixture to make rows of it.

    change: made to every sample, with random numbers of its own for each sight of it.
    features: where those of the images are, if they were computed before.
    """

    shape: RowShape
    packing: Packing = "best_fit"
    open_rows: int = 32
    change: Change | None = None
    features: Features | None = None


def make_streams(
    sources: Sequence[Source], weights: Sequence[float], rows: Rows, *, count: int, seed: int
) -> list[grain.IterDataset]:
    """`count` streams that have all sources in common, each with as large a share as its weight."""
    records = _mixed(sources, weights, seed).seed(seed).random_map(_Fitted(rows.shape, rows.change))
    return [
        pack(
            _Accepted(records.slice(slice(number, None, count)).to_iter_dataset(READ_WHEN_ASKED)),
            rows.shape,
            packing=rows.packing,
            open_rows=_staggered(rows.open_rows, number),
            seed=seed + number,
        ).map(_Made(rows.shape, rows.features))
        for number in range(count)
    ]


def _staggered(open_rows: int, number: int) -> int:
    """A stream's own number of open rows, up to a quarter more or less.

    Grain gives out all of them when one more sample does not fit, and then fills as many again.
    Streams with as many would all do so at the same steps, and devices would wait there. Multiples
    of the golden ratio lie apart for any run of neighbours, such as the streams of one process.
    """
    part = number * (math.sqrt(5) - 1) / 2 % 1
    return max(round(open_rows * (0.75 + part / 2)), 1)


def in_turn(
    streams: Mapping[int, grain.IterDataset], places: Mapping[int, str], *, workers: int
) -> grain.IterDataset:
    """A `Row` of each stream in turn, from where each was, made by worker processes if wanted."""
    turns = _Turns(list(streams.items()), dict(places))
    if not workers:
        return turns
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()  # grain reads flags, which only Google's main() parses
    # As many as share the streams evenly: then rows come in turn from the workers too.
    return turns.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=math.gcd(workers, len(streams)))
    )


def _mixed(sources: Sequence[Source], weights: Sequence[float], seed: int) -> grain.MapDataset:
    if len(sources) != len(weights) or min(weights, default=0) <= 0:
        raise InputError(
            f"mixture of {len(sources)} sources with weights {list(weights)}: "
            "each source needs a positive one"
        )
    seeds = np.random.SeedSequence(seed).generate_state(len(sources)).tolist()
    return grain.MapDataset.mix(
        [_endless(source, seed) for source, seed in zip(sources, seeds, strict=True)],
        weights,
    )


def _endless(source: Source, seed: int) -> grain.MapDataset:
    if not len(source):
        raise InputError("records of a source: there are none; check its path and filters")
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """A record as the pieces of it that each fit into a row."""

    shape: RowShape
    change: Change | None

    def __call__(self, record: Sample | Bad, rng: np.random.Generator) -> list[Sample] | Bad:
        if isinstance(record, Bad):
            return record
        try:
            sample = self.change(record, rng) if self.change else record
            return fit(sample, self.shape, rng)
        except InputError as error:
            return Bad(record.place, str(error))


class _Accepted(grain.IterDataset):
    """From pieces of records, or what is wrong with them, to one piece at a time."""

    def __iter__(self) -> "_AcceptedIterator":
        return _AcceptedIterator(iter(self.parents[0]))


class _AcceptedIterator(grain.DatasetIterator):
    """The state is that of the parent before the record whose pieces are being given out."""

    def __init__(self, parent: grain.DatasetIterator):
        super().__init__(parent)
        self._place, self._pieces, self._given = parent.get_state(), [], 0
        self._bad: list[Bad] = []

    def __next__(self) -> dict[str, Any]:
        while self._given == len(self._pieces):
            self._next_record()
        piece, bad = self._pieces[self._given], self._bad
        self._given, self._bad = self._given + 1, []
        return {"sample": piece, "bad": bad}

    def _next_record(self) -> None:
        self._place = self._parent.get_state()
        self._pieces, self._given = [], 0
        found = next(self._parent)
        if not isinstance(found, Bad):
            self._pieces = found
        elif len(self._bad) < HOPELESS:
            self._bad.append(found)
        else:
            raise InputError(
                f"{HOPELESS} unusable records in a row, such as {found.place}: {found.why}; mend "
                "the data, or leave their source out of the mixture"
            )

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._place, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._place, self._pieces, self._given, self._bad = state["parent"], [], 0, []
        if state["given"]:
            self._next_record()
            self._given = state["given"]


@dataclasses.dataclass(frozen=True)
class _Made:
    """From the samples of a row to its arrays, without those whose pictures turn out broken."""

    shape: RowShape
    features: Features | None

    def __call__(self, packed: dict[str, Any]) -> dict[str, Any]:
        samples = packed["sample"]
        bad = [(each.place, each.why) for several in packed["bad"] for each in several]
        try:
            arrays = self._row(samples)
        except InputError:
            why = [self._why_bad(sample) for sample in samples]
            bad += [
                (each.place, reason) for each, reason in zip(samples, why, strict=True) if reason
            ]
            samples = [each for each, reason in zip(samples, why, strict=True) if not reason]
            arrays = self._row(samples)
        return {"arrays": arrays, "used": len(samples), "bad": bad}

    def _row(self, samples: Sequence[Sample]) -> Batch:
        shape = self.shape
        return make_row(
            samples,
            length=shape.length,
            vision=shape.vision,
            features=self.features,
            beside=shape.beside,
        )

    def _why_bad(self, sample: Sample) -> str | None:
        try:
            self._row([sample])
        except InputError as error:
            return str(error)
        return None


class _Turns(grain.IterDataset):
    """Some streams in turn. grain deals them out to workers by `set_slice`."""

    def __init__(self, streams: list[tuple[int, grain.IterDataset]], places: dict[int, str]):
        super().__init__()
        self._streams, self._places = streams, places

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        assert not sequential_slice
        self._streams = self._streams[sl]

    def __iter__(self) -> "_TurnsIterator":
        return _TurnsIterator(self._streams, self._places)


class _TurnsIterator(grain.DatasetIterator):
    def __init__(self, streams: list[tuple[int, grain.IterDataset]], places: dict[int, str]):
        super().__init__()
        self._iterators = [(number, iter(stream)) for number, stream in streams]
        for number, iterator in self._iterators:
            if number in places:
                _go_on(iterator, places[number])
        self._turn = 0

    def __next__(self) -> Row:
        number, iterator = self._iterators[self._turn % len(self._iterators)]
        row = next(iterator)
        self._turn += 1
        return Row(stream=number, place=json.dumps(iterator.get_state()), **row)

    def get_state(self) -> dict[str, Any]:
        """Not used: rows say themselves where their streams go on."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def _go_on(iterator: grain.DatasetIterator, place: str) -> None:
    try:
        iterator.set_state(json.loads(place))
    except (ValueError, TypeError, KeyError, IndexError):
        raise damaged_state() from None


def damaged_state() -> InputError:
    return InputError("data state in the checkpoint: damaged; use another checkpoint")
