"""A directory of steps, as files: neither JAX nor Orbax is needed to list, verify or lock it.

    <directory>/lock                one trainer at a time
    <directory>/1200/state/         every array of the train state, by name (Orbax)
    <directory>/1200/iterator/0.bin where the data iterator of process 0 stands
    <directory>/1200/config.json    the run's config
    <directory>/1200/files/         what else belongs to the weights, like tokenizer.model
    <directory>/1200/digests.sha256 a digest of every file above

A step is written under another name, and renamed when all of it is on the disk: what carries a
step's name is finished.
"""

import os
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO

from l32jax.checkpoint.engine import digests, locks
from l32jax.errors import InputError

STATE, CONFIG, ITERATOR, FILES = "state", "config.json", "iterator", "files"
UNFINISHED, REMOVED = ".unfinished", ".removed"


class Steps:
    """The steps below one directory, which need not exist yet."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory).absolute()

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def temporary(self, step: int) -> Path:
        return self.directory / f"{step}{UNFINISHED}"

    def all(self) -> list[int]:
        """Every step that has a directory, ascending, damaged or not."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if _is_step(path))

    def latest(self) -> int | None:
        """The newest step that has digests; its files may still violate them."""
        finished = (s for s in self.all() if (self.path(s) / digests.SIDECAR).exists())
        return max(finished, default=None)

    def newest_undamaged(self) -> tuple[int | None, dict[int, str]]:
        """The newest step whose files are as written, and what is wrong with each newer one."""
        complaints = {}
        for step in reversed(self.all()):
            found = digests.problems(self.path(step))
            if not found:
                return step, complaints
            complaints[step] = found[0] + (f" (and {len(found) - 1} more)" if found[1:] else "")
        return None, complaints

    def commit(self, step: int) -> None:
        """Makes what was written under the temporary name the step."""
        if self.path(step).exists():
            self.remove(step)
        os.rename(self.temporary(step), self.path(step))
        digests.sync(self.directory)

    def discard(self, step: int) -> None:
        """Removes a failed save; writes that Orbax has abandoned may come in for a moment yet."""
        for _ in range(20):
            shutil.rmtree(self.temporary(step), ignore_errors=True)
            time.sleep(0.1)
            if not self.temporary(step).exists():
                return

    def remove(self, step: int) -> None:
        """Renames first: a half-deleted step must not look like a damaged one."""
        removed = self.directory / f"{step}{REMOVED}"
        os.rename(self.path(step), removed)
        shutil.rmtree(removed, ignore_errors=True)

    def keep_only(self, kept: Collection[int]) -> None:
        for step in self.all():
            if step not in kept:
                self.remove(step)

    def remove_temporaries(self) -> None:
        """Frees what a killed or failed save or removal has left."""
        for path in self.directory.iterdir():
            if path.suffix in (UNFINISHED, REMOVED) and path.stem.isdecimal():
                shutil.rmtree(path, ignore_errors=True)

    def lock(self) -> IO[bytes]:
        """Creates the directory, and the open file whose lock ends with this process at the latest.

        InputError while another process, or another open file of this one, holds the lock.
        """
        return locks.take(self.directory, f"checkpoint in {self.directory}")

    def nothing_usable(self, complaints: Mapping[int, str] | None = None) -> InputError:
        each = "; ".join(f"step {step}: {text}" for step, text in (complaints or {}).items())
        return InputError(
            f"checkpoint in {self.directory}: {f'no usable step ({each})' if each else 'no step'}; "
            "give the directory of a run that has saved one"
        )


def is_store(path: str | os.PathLike) -> bool:
    """Whether this is a directory of steps, going by what is in them."""
    path = Path(path)
    return path.is_dir() and any(map(is_step, path.iterdir()))


def is_step(path: str | os.PathLike) -> bool:
    """Whether this is one step of such a directory, which may be damaged."""
    path = Path(path)
    return _is_step(path) and (
        (path / digests.SIDECAR).exists() or (path / STATE / "_METADATA").exists()
    )


def verify(directory: str | os.PathLike) -> list[str]:
    """Reads every file of every step; what is not as it was written, a line each."""
    steps = Steps(directory)
    if not is_store(directory):
        raise steps.nothing_usable()
    return [
        f"step {step}: {problem}"
        for step in steps.all()
        for problem in digests.problems(steps.path(step))
    ]


def _is_step(path: Path) -> bool:
    """Whether it has a name that `Steps.path` gives, of a number that someone can have reached."""
    name = path.name
    number = name.isascii() and name.isdecimal() and len(name) < 10 and str(int(name)) == name
    return number and path.is_dir()
