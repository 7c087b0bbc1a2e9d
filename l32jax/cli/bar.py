"""How far a long task is, on stderr."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Bar:
    """Which step it is, how much of it is done, and the time that is left."""

    def __init__(self):
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        self._bar.start()
        self._task = self._bar.add_task(what, total=total)

    def advance(self, amount: int) -> None:
        assert self._task is not None
        self._bar.advance(self._task, amount)

    def close(self) -> None:
        if self._task is not None:  # it would print an empty line
            self._bar.stop()
