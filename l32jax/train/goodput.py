"""Where the time of a run went, over all its restarts: the share that was learning is its goodput.

`<run>/goodput.jsonl` has a line whenever a process enters a stage, has been at work for a while,
or ends, with the seconds that it spent since its last line, by bucket. The buckets are those of
ml-goodput-measurement, and of what is productive one:

  step                                      steps, with what overlaps them
  training_prep                             until a stage's first batch: data, parameters, optimizer
  program_startup                           the first step of a stage, which compiles
  data_loading_sync                         waits for a batch while the devices had nothing to do
  unproductive_checkpoint_restore_time      reading a checkpoint
  unproductive_checkpoint_save_time         what of a save training waits for
  custom_badput_events                      looks inside
  wasted_progress_from_disruption           steps that a kill has undone, and that were done again
  infrastructure_recovery_from_disruption   between one process and the next
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

from l32jax.train import journal

FILE = "goodput.jsonl"
Spent = Literal[
    "step",
    "training_prep",
    "program_startup",
    "data_loading_sync",
    "unproductive_checkpoint_restore_time",
    "unproductive_checkpoint_save_time",
    "custom_badput_events",
]
LOST, IDLE = "wasted_progress_from_disruption", "infrastructure_recovery_from_disruption"
RECENT = 32  # steps whose median is the usual one
LEAST, MOST, SHARE = 1.0, 60.0, 0.05  # between lines: what a kill leaves untold counts as idle


class Clock:
    """Every second of this process belongs to one bucket. Without a directory nothing is kept."""

    def __init__(self, directory: Path | None):
        self._directory, self._file = directory, None
        self._bucket: Spent = "training_prep"
        self._spent = dict.fromkeys(get_args(Spent), 0.0)  # since the last line
        self._began = self._since = self._written = time.monotonic()
        self._before = Goodput({}, 0)
        self._step_began, self._steps = self._began, deque[float](maxlen=RECENT)
        self.entered = False

    def enter(self, stage: int, step: int) -> None:
        """A stage goes on from a step: what was done of it beyond that is lost.

        Before that nothing is written: a run that has nothing left to do is not going on.
        """
        starts, self.entered = not self.entered, True
        if self._directory is not None and starts:
            self._file = journal.open_to_append(self._directory / FILE)
        self._write(event="enter", stage=stage, step=step, starts=starts)
        if self._directory is not None:
            self._before = read(self._directory)

    def switch(self, bucket: Spent) -> None:
        """From now on time goes there."""
        now = time.monotonic()
        self._spent[self._bucket] += now - self._since
        self._since, self._bucket = now, bucket

    @contextmanager
    def spending(self, bucket: Spent) -> Iterator[None]:
        before = self._bucket
        self.switch(bucket)
        try:
            yield
        finally:
            self.excuse()
            self.switch(before)

    def move(self, seconds: float, bucket: Spent) -> None:
        """Of the time just spent, so much belongs elsewhere."""
        self.switch(self._bucket)
        self._spent[self._bucket] -= seconds
        self._spent[bucket] += seconds

    def reached(self, stage: int, step: int, *, last: bool = False) -> None:
        """So many steps of the stage are done; written now and then, and if it is the last."""
        now = time.monotonic()
        self._steps.append(now - self._step_began)
        self._step_began = now
        pause = min(max(SHARE * (now - self._began), LEAST), MOST)
        if last or now - self._written > pause:
            self._write(event="reached", stage=stage, step=step)

    @property
    def usual_step(self) -> float:
        """The median of the seconds between the ends of recent steps."""
        return median(self._steps) if self._steps else 0.0

    def seconds_in_step(self) -> float:
        """Since the end of the last step, if nothing but steps goes on; also from other threads."""
        return time.monotonic() - self._step_began if self._bucket == "step" else 0.0

    def excuse(self) -> None:
        """The step that goes on begins now."""
        self._step_began = time.monotonic()

    def so_far(self) -> "Goodput":
        """Of the whole run, with what is not written yet."""
        self.switch(self._bucket)
        return _plus(self._before, self._spent)

    def close(self) -> None:
        if self._file is not None:
            self._write(event="end")
            self._file.close()

    def _write(self, **event: Any) -> None:
        self.switch(self._bucket)
        self._written = self._since
        seconds = {bucket: round(spent, 6) for bucket, spent in self._spent.items() if spent}
        self._before = _plus(self._before, seconds)
        self._spent = dict.fromkeys(self._spent, 0.0)
        if self._file is not None:
            journal.append(self._file, {"time": time.time(), **event, "seconds": seconds})


class Goodput(NamedTuple):
    """Seconds by bucket, of all that is written; `share` of them were productive."""

    seconds: dict[str, float]
    starts: int

    @property
    def share(self) -> float:
        total = sum(self.seconds.values())
        return self.seconds.get("step", 0.0) / total if total else 0.0

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        rest = sorted(self.seconds.items(), key=lambda item: -item[1])
        parts = [f"{bucket} {spent / total:.1%}" for bucket, spent in rest if bucket != "step"]
        parts = [part for part in parts if not part.endswith(" 0.0%")]
        return ", ".join([f"goodput {self.share:.1%} of {total:,.0f} s", *parts])


def _plus(goodput: Goodput, seconds: Mapping[str, float]) -> Goodput:
    names = {**goodput.seconds, **seconds}
    both = {name: goodput.seconds.get(name, 0.0) + seconds.get(name, 0.0) for name in names}
    return goodput._replace(seconds=both)


class _Work(NamedTuple):
    """Steps (first, last] of a stage, and the seconds that they took."""

    stage: int
    first: int
    last: int
    seconds: float


def read(directory: Path) -> Goodput:
    """Of a run, so far; lines that are damaged count for nothing."""
    return total(record for record in journal.read(directory / FILE).records if _is_event(record))


def total(events: Iterable[Mapping[str, Any]]) -> Goodput:
    """Adds up; steps beyond the one that a later process began from were lost."""
    found = Goodput({}, 0)
    done: list[_Work] = []
    step, then = 0, None
    for event in events:
        begin = event["time"] - sum(event["seconds"].values())
        if event.get("starts"):
            idle = 0.0 if then is None else max(begin - then, 0.0)
            found = _plus(found, {IDLE: idle})._replace(starts=found.starts + 1)
        then = event["time"]
        found = _plus(found, event["seconds"])
        if event["event"] == "enter":
            step = event["step"]
            lost = _undone(done, event["stage"], step)
            found = _plus(found, {"step": -lost, LOST: lost})
        elif event["event"] == "reached":
            work = event["seconds"].get("step", 0.0)
            done.append(_Work(event["stage"], step, event["step"], work))
            step = event["step"]
    return found


def _undone(done: list[_Work], stage: int, step: int) -> float:
    """Takes the work beyond a step from the end of the list; its seconds."""
    lost = 0.0
    while done and (done[-1].stage, done[-1].last) > (stage, step):
        work = done.pop()
        kept = max(step - work.first, 0) if work.stage == stage else 0
        share = kept / (work.last - work.first) if kept else 0.0
        lost += work.seconds * (1 - share)
        if kept:
            done.append(work._replace(last=step, seconds=work.seconds * share))
    return lost


def _is_event(record: Mapping[str, Any]) -> bool:
    seconds, event = record.get("seconds"), record.get("event")
    if not isinstance(seconds, dict):
        return False
    numbers = [record.get("time"), *seconds.values()]
    place = [record.get("stage"), record.get("step")]
    return (
        event in ("enter", "reached", "end")
        and (event == "end" or all(type(number) is int for number in place))
        and all(type(number) in (int, float) and abs(number) < inf for number in numbers)
    )
