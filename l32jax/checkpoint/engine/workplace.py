"""Where a checkpoint is made before it is one: a folder beside the destination, and its journal.

    <destination>.unfinished/journal.jsonl  what is being made of what, then a line a finished unit
    <destination>.unfinished/lock           one writer at a time
    <destination>.unfinished/content/       what takes the destination's name in the end

A kill at any point leaves the folder, and `resume` goes on with it; what carries the destination's
name is whole.
"""

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l32jax.checkpoint.engine import digests, locks
from l32jax.checkpoint.engine.manifest import MANIFEST, beside
from l32jax.checkpoint.failures import SaveError
from l32jax.errors import InputError

UNFINISHED, JOURNAL, CONTENT = ".unfinished", "journal.jsonl", "content"
MARGIN = 64 << 20  # bytes that a file system needs for itself

Record = dict[str, Any]  # what is to be remembered of a finished unit; JSON


def unfinished(destination: Path) -> Path:
    """The folder that stands beside a destination until it is whole."""
    return Path(f"{destination.absolute()}{UNFINISHED}")


class Workplace:
    """Held by one process. `directory` is where to write, `done` what was written before.

    `is_local`: what was written stays in the directory.

    `task` is what identifies the work: only the same can be resumed, None never. Use as a context
    manager: an InputError removes everything (its source is bad), anything else leaves it for
    `resume`.
    """

    is_local = True

    def __init__(self, destination: Path, task: Mapping[str, Any] | None, *, resume: bool = False):
        assert task is not None or not resume
        self.destination = destination.absolute()
        self._home = unfinished(destination)
        self._require_free()
        self.directory = self._home / CONTENT
        self._resumable = task is not None
        self._lock = locks.take(self._home, f"destination {str(self.destination)!r}")
        self._mutex = threading.Lock()
        try:
            self.done = (
                self._begin(task) if task is None or not resume else self._resume(dict(task))
            )
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "Workplace":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and (issubclass(kind, InputError) or not self._resumable):
            self._discard()
        self._lock.close()

    def require_room(self, size: int) -> None:
        """An error if fewer than `size` bytes are free, beside what is written already.

        InputError if nothing is written yet, else SaveError, which keeps what is.
        """
        there = sum(path.stat().st_blocks * 512 for path in self.directory.rglob("*"))
        free = shutil.disk_usage(self._home).free
        if free + there < size + MARGIN:
            kind = SaveError if self.done else InputError
            raise kind(
                f"destination {str(self.destination)!r}: it needs {size / 2**30:.1f} GiB, "
                f"{(free + there) / 2**30:.1f} are free; make room, or choose another disk"
            )

    def record(self, unit: str, record: Record) -> None:
        """Remembers a unit whose bytes are on the disk."""
        with self._mutex:
            self.done[unit] = record
            self._append({"unit": unit, "record": record})

    def hand_over(self, directory: Path) -> None:
        """Takes what is below `directory` to the destination, if that is elsewhere."""

    def whole(self, single: str | None = None) -> Any:
        """Where all of it can be looked at before it is finished."""
        return self.directory / (single or ".")

    def finish(self, single: str | None = None) -> None:
        """Gives the content its destination's name; with `single`, the one file of that name.

        The manifest of a single file is put beside it.
        """
        digests.sync_below(self.directory)
        if single:
            os.replace(self.directory / MANIFEST, beside(self.destination))
        os.rename(self.directory / single if single else self.directory, self.destination)
        digests.sync(self.destination.parent)
        shutil.rmtree(self._home, ignore_errors=True)

    def _require_free(self) -> None:
        if os.path.lexists(self.destination):
            raise InputError(
                f"destination {str(self.destination)!r}: it exists; choose another name"
            )

    def _discard(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)

    def _begin(self, task: Mapping[str, Any] | None) -> dict[str, Record]:
        if self._resumable and (self._home / JOURNAL).exists():
            raise InputError(
                f"destination {str(self.destination)!r}: an unfinished one is in "
                f"{self._home.name}; go on with it by --resume, or remove it"
            )
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        (self._home / JOURNAL).unlink(missing_ok=True)
        self._append({"task": task and dict(task)})
        return {}

    def _resume(self, task: Record) -> dict[str, Record]:
        lines = self._lines()
        if not lines:
            return self._begin(task)
        begun = lines[0].get("task") or {}
        if changed := [name for name in task if begun.get(name) != task[name]]:
            name = changed[0]
            raise InputError(
                f"destination {str(self.destination)!r}: its unfinished one has {name} "
                f"{begun.get(name)!r}, this is {task[name]!r}; remove {self._home.name}, or give "
                "the same"
            )
        return {line["unit"]: line["record"] for line in lines if "unit" in line}

    def _lines(self) -> list[Record]:
        """The journal, without a last line that a kill has cut off."""
        path = self._home / JOURNAL
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        try:
            return [_checked(json.loads(line)) for line in whole.splitlines()]
        except ValueError:
            raise InputError(
                f"destination {str(self.destination)!r}: the journal in {self._home.name} is "
                "damaged; remove that folder, and begin again"
            ) from None

    def _append(self, line: Record) -> None:
        with (self._home / JOURNAL).open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _checked(line: Any) -> Record:
    """ValueError unless it is a line of a journal."""
    match line:
        case {"task": dict()} | {"task": None} | {"unit": str(), "record": dict()}:
            return line
    raise ValueError(line)
