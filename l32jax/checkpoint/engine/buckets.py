"""Where a checkpoint is made whose destination is in a bucket: units go there as they are finished.

    <here>/<bucket>-<prefix>.unfinished/  as in workplace.py; of what was handed over, small files

There is no rename in a bucket: digests.sha256 comes last, and what has none is not a checkpoint.
"""

import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from l32jax.checkpoint.engine.digests import SIDECAR
from l32jax.checkpoint.engine.folders import Folder
from l32jax.checkpoint.engine.workplace import JOURNAL, Workplace
from l32jax.checkpoint.failures import SaveError
from l32jax.errors import InputError

THREADS = 8  # uploads wait for the network
KEPT_BYTES = 1 << 20  # files above this are data, which nobody looks at again
STAGED_BYTES = 2 << 30  # that the units under way may need on this disk


class BucketWorkplace(Workplace):
    """See `Workplace`; the working directory holds the journal."""

    is_local = False

    def __init__(
        self, destination: Folder, task: Mapping[str, Any] | None, *, resume: bool = False
    ):
        self._folder, self._resumes = destination, resume
        self._there: set[Path] = set()
        name = destination.where.partition("://")[2].replace("/", "-")
        if task is not None:
            task = {**task, "destination": destination.where}
        super().__init__(Path(name), task, resume=resume)

    def require_room(self, size: int) -> None:
        super().require_room(min(size, STAGED_BYTES))

    def hand_over(self, directory: Path) -> None:
        """Replaces what the bucket has below `directory`, and keeps its small files here too."""
        self._folder.child(self._name(directory)).remove()
        self._upload(_files(directory))
        for path in _files(directory):
            if path.stat().st_size > KEPT_BYTES:
                path.unlink()

    def whole(self, single: str | None = None) -> str:
        """Uploads all but the digests. The address is that of the step, as the run has none yet."""
        assert single is None, "a single file is not written to a bucket"
        left = set(_files(self.directory)) - self._there
        self._upload(path for path in left if path.name != SIDECAR)
        return self._folder.child(self._name(self._sidecar.parent)).where

    def finish(self, single: str | None = None) -> None:
        self.whole(single)
        self._upload([self._sidecar])
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def _sidecar(self) -> Path:
        (path,) = self.directory.rglob(SIDECAR)
        return path

    def _require_free(self) -> None:
        """Only what the journal here tells of may be there, and not finished."""
        names = self._folder.names()
        finished = any(Path(name).name == SIDECAR for name in names)
        goes_on = self._resumes and (self._home / JOURNAL).exists()
        if finished or (names and not goes_on):
            raise InputError(
                f"destination {self._folder.where!r}: something is there; choose another name, or "
                "remove it"
            )

    def _discard(self) -> None:
        try:
            self._folder.remove()
        except SaveError:
            return  # its journal is needed by whoever tries again
        super()._discard()

    def _upload(self, paths: Iterable[Path]) -> None:
        def upload(path: Path) -> None:
            self._folder.write(self._name(path), path.read_bytes())
            self._there.add(path)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(upload, paths))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.directory).as_posix()


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
