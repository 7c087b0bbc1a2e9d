"""Prepares slowly, so that tests can kill who does it: CONFIG.py."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from l32jax.data.prepare.runners import on_processes
from l32jax.data.prepare.task import Task

UNIT_RECORDS = 8
SECONDS = 0.2  # a task


@dataclasses.dataclass(frozen=True)
class Slow(Task):
    task: Task

    @property
    def result(self) -> Path:
        return self.task.result

    def run(self) -> None:
        self.task.run()
        time.sleep(SECONDS / 2)


@dataclasses.dataclass(frozen=True)
class Unsaved(Slow):
    """Takes its time before it writes anything."""

    def run(self) -> None:
        time.sleep(SECONDS)
        self.task.run()


def slowly(tasks: Sequence[Task], *, workers: int) -> Iterator[int]:
    kinds = (Slow, Unsaved)
    slow = [kinds[index % 2](task) for index, task in enumerate(tasks)]
    return on_processes(slow, workers=workers)


def main() -> int:
    from l32jax.cli import data
    from l32jax.data.prepare import run, runners

    run.UNIT_RECORDS = UNIT_RECORDS
    runners.on_processes = slowly  # type: ignore[assignment]
    return data.prepare((sys.argv[1],), workers=2)


if __name__ == "__main__":
    sys.exit(main())
