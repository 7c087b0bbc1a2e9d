"""How far something is that comes before training, and what time is left."""

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

TOLD_SECONDS = 10.0  # between lines where there is no terminal


@contextmanager
def told(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called with how many more are done; the first process shows it."""
    console = Console(stderr=True)
    if jax.process_index() or not total:
        yield lambda more: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda more: bar.advance(task, more)
    else:
        yield _Lines(what, total)


class _Lines:
    """A line now and then, where there is no terminal to draw on."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._began = self._told = time.monotonic()

    def __call__(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        if self._done == self._total or now - self._told > TOLD_SECONDS:
            self._told = now
            seconds = (now - self._began) * (self._total - self._done) / max(self._done, 1)
            left = datetime.timedelta(seconds=round(seconds))
            print(f"{self._done:,} of {self._total:,} {self._what}, {left} left", file=sys.stderr)
