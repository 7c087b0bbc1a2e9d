"""What a preparation is made of, whoever runs it."""

import abc
from pathlib import Path


class Task(abc.ABC):
    """Writes one result, which it alone decides about; run again it writes the same bytes.

    So any scheduler may run tasks anywhere that sees the output folder, in any order, and again if
    a worker dies.
    """

    @property
    @abc.abstractmethod
    def result(self) -> Path:
        """The file that is there once it is done."""

    @abc.abstractmethod
    def run(self) -> None: ...


def run_task(task: Task) -> None:
    if not task.result.exists():
        task.run()
