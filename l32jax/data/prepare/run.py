"""Prepares data: units of records, then their duplicates, then shards in a new order.

What is done is kept: the same command goes on after whatever stopped it.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from l32jax.data.prepare.config import PrepareConfig
from l32jax.data.prepare.language import check_languages
from l32jax.data.prepare.output import PLACE, DuplicatesTask, ShardTask, bounds, shuffled
from l32jax.data.prepare.runners import Runner
from l32jax.data.prepare.statistics import statistics
from l32jax.data.prepare.task import Task
from l32jax.data.prepare.units import Unit, UnitTask
from l32jax.data.prepare.workplace import Workplace
from l32jax.data.records import too_many_bad
from l32jax.data.shards import INDEX, read_index, require_same, tokenizer_digest, write_index
from l32jax.data.sources.open import CHARTS, EASY_VQA, open_records
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

logger = logging.getLogger(__name__)

UNIT_RECORDS = 512
BANDS_AT_ONCE = 20_000_000  # which a part of the duplicates has in memory
LOGGED_PLACES = 20
BAD = "bad.jsonl"


@runtime_checkable
class Progress(Protocol):
    def begin(self, what: str, total: int) -> None: ...

    def advance(self, amount: int) -> None: ...


def prepare(
    config: PrepareConfig, runner: Runner, progress: Progress | None = None
) -> dict[str, Any]:
    """Makes `config.output`, the same bytes with any runner, and returns the content of its index.

    Beside the shards it has bad.jsonl, which says where every unusable record is, and why.

    Raises:
      InputError: a source or the tokenizer cannot be read, more records are unusable than
        `max_bad` allows, or the output is there and of another preparation.
    """
    if "://" in config.output:
        raise InputError(f"output {config.output!r}: must be a folder that all workers see")
    lengths, about = _opened(config)
    work = _Work(_everywhere(config), runner, progress)
    if (work.place.output / INDEX).exists():
        index = require_same(read_index(work.place.output), about, work.place.output)
        shutil.rmtree(work.place.folder, ignore_errors=True)
        return index
    _begin(work.place, about)
    units = list(_units(work.config.sources, lengths))
    removed = work.prepare_units(units)
    rows, unit_of = _rows(work.place, len(units))
    kept = ~np.isin(rows["number"], work.duplicates(len(units)))
    removed["duplicate"] = int((~kept).sum())
    about |= {"removed": removed, "statistics": statistics(rows[kept])}
    counts = work.write_shards(rows[kept], unit_of[kept])
    write_index(work.place.output, tokenizer=about.pop("tokenizer"), records=counts, about=about)
    shutil.rmtree(work.place.folder)
    return read_index(work.place.output)


def _opened(config: PrepareConfig) -> tuple[list[int], dict[str, Any]]:
    """How many records each source has, and what decides about the output."""
    digest = tokenizer_digest(Tokenizer.from_file(config.tokenizer))
    if config.languages:
        check_languages(config.languages)
    for name in config.sources:
        if name.startswith((EASY_VQA, CHARTS)):
            raise InputError(
                f"source {name!r} to prepare: it comes with the package, ready to be trained on; "
                "leave it out"
            )
    lengths = [len(open_records(name)) for name in config.sources]
    decides = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in ("output", "tokenizer", "sources", "max_bad"):
        del decides[name]
    sources = [[name, length] for name, length in zip(config.sources, lengths, strict=True)]
    return lengths, {"sources": sources, "tokenizer": digest, "config": decides}


def _everywhere(config: PrepareConfig) -> PrepareConfig:
    """With paths that do not depend on where a process was started."""
    sources = tuple(name if "://" in name else os.path.abspath(name) for name in config.sources)
    tokenizer, output = os.path.abspath(config.tokenizer), os.path.abspath(config.output)
    return dataclasses.replace(config, sources=sources, tokenizer=tokenizer, output=output)


def _begin(place: Workplace, about: dict[str, Any]) -> None:
    """Makes the output folder, or goes on with it if the same was begun there."""
    if place.begun.exists():
        require_same(json.loads(place.begun.read_text(encoding="utf-8")), about, place.output)
        return
    if place.output.exists() and any(path != place.folder for path in place.output.iterdir()):
        raise InputError(f"output {str(place.output)!r}: it is there; remove it, or choose another")
    place.folder.mkdir(parents=True, exist_ok=True)
    with place.writing(place.begun) as path:
        path.write_text(json.dumps(about), encoding="utf-8")


def _units(sources: Sequence[str], lengths: Sequence[int]) -> Iterator[Unit]:
    first, number = 0, 0
    for name, length in zip(sources, lengths, strict=True):
        for start in range(0, length, UNIT_RECORDS):
            yield Unit(number, name, start, min(start + UNIT_RECORDS, length), first)
            number += 1
        first += length


@dataclasses.dataclass(frozen=True)
class _Work:
    """The three steps, each a list of tasks."""

    config: PrepareConfig
    runner: Runner
    progress: Progress | None

    @property
    def place(self) -> Workplace:
        return Workplace(Path(self.config.output))

    def prepare_units(self, units: Sequence[Unit]) -> Counter[str]:
        """How many records were removed, by reason."""
        seen, bad, removed = 0, 0, Counter[str]()
        for number in self._do([UnitTask(self.config, unit) for unit in units], "reading"):
            summary = _summary(self.place, number)
            seen += units[number].stop - units[number].start
            bad += len(summary["bad"])
            removed.update(summary["removed"])
            if too_many_bad(bad, seen, self.config.max_bad):
                last = summary["bad"][-1]
                raise InputError(
                    f"records of {', '.join(self.config.sources)}: {bad} of {seen} are unusable, "
                    f"such as {last['place']} ({last['why']}); correct them, or raise max_bad"
                )
        removed["unusable"] = bad
        self._list_bad(len(units))
        return removed

    def _list_bad(self, units: int) -> None:
        bad = [each for unit in range(units) for each in _summary(self.place, unit)["bad"]]
        for each in bad[:LOGGED_PLACES]:
            logger.warning("%s: skipped (%s)", each["place"], each["why"])
        if len(bad) > LOGGED_PLACES:
            logger.warning("%d more were skipped; %s has all", len(bad) - LOGGED_PLACES, BAD)
        with self.place.writing(self.place.output / BAD) as path:
            path.write_text("".join(json.dumps(each) + "\n" for each in bad), encoding="utf-8")

    def duplicates(self, units: int) -> np.ndarray:
        """The numbers of records that are near-duplicates of earlier ones."""
        rules = self.config.duplicates
        if rules is None:
            return np.zeros(0, np.uint64)
        files = (self.place.unit(unit, "bands.npy") for unit in range(units))
        bands = sum(len(np.load(path, mmap_mode="r")) for path in files)
        parts = -(-bands // BANDS_AT_ONCE) or 1
        tasks = [DuplicatesTask(self.place, rules, units, part, parts) for part in range(parts)]
        for _ in self._do(tasks, "comparing"):
            pass
        return np.concatenate([np.load(task.result) for task in tasks])

    def write_shards(self, rows: np.ndarray, unit_of: np.ndarray) -> list[int]:
        """How many samples each shard has."""
        if not len(rows):
            raise InputError(
                f"output {self.config.output!r}: nothing is left to write; relax the rules"
            )
        order = shuffled(rows["number"], self.config.seed)
        places = np.zeros(len(rows), PLACE)
        places["unit"], places["offset"], places["size"] = unit_of, rows["offset"], rows["size"]
        self.place.save(self.place.order, places[order])
        ranges = bounds(len(rows), self.config.num_shards)
        tasks = [ShardTask(self.place, i, len(ranges), *each) for i, each in enumerate(ranges)]
        for _ in self._do(tasks, "writing"):
            pass
        return [stop - start for start, stop in ranges]

    def _do(self, tasks: Sequence[Task], what: str) -> Iterator[int]:
        """The indices of tasks as they are done, first of those that were before."""
        before = [index for index, task in enumerate(tasks) if task.result.exists()]
        rest = sorted(set(range(len(tasks))) - set(before))
        if self.progress is not None:
            self.progress.begin(what, len(tasks))
            self.progress.advance(len(before))
        yield from before
        for index in self.runner([tasks[index] for index in rest]) if rest else ():
            yield rest[index]
            if self.progress is not None:
                self.progress.advance(1)


def _rows(place: Workplace, units: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all units in order, and the unit of each."""
    found = [np.load(place.unit(unit, "rows.npy")) for unit in range(units)]
    return np.concatenate(found), np.repeat(np.arange(units), list(map(len, found)))


def _summary(place: Workplace, unit: int) -> dict[str, Any]:
    return json.loads(place.unit(unit, "json").read_bytes())
