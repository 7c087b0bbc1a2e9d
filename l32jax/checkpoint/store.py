"""Saves and restores a train state: asynchronously, verified, onto any mesh. The one home of Orbax.

Orbax writes the arrays and no more. Its CheckpointManager changes files after the last moment at
which it would let us hash them, so steps.py has the (few) things that manager is for.
"""

import dataclasses
import gc
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from l32jax.checkpoint.agreement import undamaged_step
from l32jax.checkpoint.arrays import named, require_equal
from l32jax.checkpoint.engine import digests
from l32jax.checkpoint.failures import SaveError, quieten_orbax, reason
from l32jax.checkpoint.steps import CONFIG, FILES, ITERATOR, STATE, Steps
from l32jax.errors import InputError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """All of a step. `iterator_states` has one entry per process of the run that saved it."""

    step: int
    state: Any
    iterator_states: tuple[bytes, ...]
    config_json: str


class Reader:
    """Reads the steps of a directory, also while a trainer writes there."""

    def __init__(self, directory: str | os.PathLike):
        self._steps = Steps(directory)

    def steps(self) -> list[int]:
        """Every step that has a directory, ascending, damaged or not."""
        return self._steps.all()

    def latest_step(self) -> int | None:
        """The newest step that has digests; restoring may still find them violated."""
        return self._steps.latest()

    def restore(self, target: Any, *, may_lack: str = "") -> Restored:
        """The newest undamaged step, its arrays placed as `target` says.

        `target` is a tree of `jax.ShapeDtypeStruct` (or arrays) with shardings on real devices.
        What is named `may_lack`/… is None in the result if the step was saved without it.
        InputError if no step is undamaged, or if names, shapes or dtypes differ from the target's.
        """
        step = self._undamaged_step()
        path = self._steps.path(step)
        iterators = sorted((path / ITERATOR).iterdir(), key=lambda file: int(file.stem))
        return Restored(
            step,
            self._restore_arrays(step, target, may_lack),
            tuple(file.read_bytes() for file in iterators),
            (path / CONFIG).read_text(encoding="utf-8"),
        )

    def _undamaged_step(self) -> int:
        return undamaged_step(self._steps)

    def _restore_arrays(self, step: int, target: Any, may_lack: str) -> Any:
        path = self._steps.path(step)
        wanted = named(target)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata: Any = checkpointer.metadata(path / STATE)
            found = metadata.item_metadata.tree
            lacking = [n for n in wanted if may_lack and n not in found and n.startswith(may_lack)]
            names = list(wanted)
            wanted = {name: leaf for name, leaf in wanted.items() if name not in lacking}
            require_equal(wanted, found, path)
            arguments = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            )
            arrays = checkpointer.restore(path / STATE, args=arguments)
        return jax.tree.unflatten(jax.tree.structure(target), [arrays.get(name) for name in names])


class Store(Reader):
    """The one writer of a directory: saves while training goes on, keeps the newest `keep` steps.

    All processes of a run make one together, call the same methods in the same order, and close it.
    Damaged steps that `restore` passed over make way for the next save.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3):
        assert keep >= 1
        super().__init__(directory)
        self._keep = keep
        quieten_orbax()
        self._lock = self._steps.lock() if jax.process_index() == 0 else None
        if self._lock:
            self._steps.remove_temporaries()
        self._rejected: set[int] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None

    def save(
        self,
        step: int,
        state: Any,
        *,
        config_json: str,
        iterator_state: bytes = b"",
        extra_files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copies the state to host memory and returns; a thread writes it.

        `state` is a tree of arrays, which may be donated as soon as this returns; `iterator_state`
        is this process's. SaveError if the save before failed; this one is then under way all the
        same. InputError if the directory has this step or a newer one that was not found damaged.
        """
        failure = self._finish()
        if newer := [s for s in self.steps() if s >= step and s not in self._rejected]:
            raise InputError(
                f"step {step} in {self._steps.directory}: step {newer[-1]} is there already; "
                "resume from it, or give the run another directory"
            )
        files = {CONFIG: config_json.encode()}
        for process, content in enumerate(_gathered(iterator_state)):
            files[f"{ITERATOR}/{process}.bin"] = content
        for name, content in (extra_files or {}).items():
            assert name == Path(name).name, f"{name!r} is not a plain file name"
            files[f"{FILES}/{name}"] = content
        self._start(step, named(state), files)
        if failure:
            raise failure

    def wait(self) -> None:
        """Returns when the last save is a finished step; SaveError if it failed."""
        if failure := self._finish():
            raise failure

    def close(self) -> None:
        """Waits, and lets another trainer in; SaveError if the last save failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._lock:
                self._lock.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            self.close()
        except SaveError as failure:
            if kind is None:
                raise
            logger.warning("%s", failure)  # must not hide what ends the run

    def _undamaged_step(self) -> int:
        self.wait()
        chosen = super()._undamaged_step()
        self._rejected = {step for step in self.steps() if step > chosen}
        return chosen

    def _start(self, step: int, arrays: dict[str, Any], files: dict[str, bytes]) -> None:
        temporary = self._steps.temporary(step)
        if self._lock:
            self._steps.remove_temporaries()
        needed = sum(leaf.nbytes for leaf in arrays.values())
        if any(_gathered(b"full" if self._lock and self._free() < needed else b"")):
            raise self._save_error(step, f"its arrays have up to {needed / 2**20:.0f} MiB")
        checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        try:
            if self._lock:
                temporary.mkdir()
            with jax.transfer_guard("allow"):
                checkpointer.save(temporary / STATE, args=ocp.args.PyTreeSave(arrays))
        except BaseException as error:
            checkpointer.close()
            if self._lock:
                self._steps.discard(step)
            if isinstance(error, OSError):
                raise self._save_error(step, reason(error)) from error
            raise
        self._saving = step, self._thread.submit(self._complete, step, files, checkpointer)

    def _complete(
        self, step: int, files: dict[str, bytes], checkpointer: ocp.AsyncCheckpointer
    ) -> None:
        """Runs in the thread: when the arrays are written adds the rest, and commits."""
        try:
            checkpointer.wait_until_finished()
            if self._lock:
                self._commit(step, files)
        except BaseException:
            logger.debug("the save of step %d failed", step, exc_info=True)
            if self._lock:
                self._steps.discard(step)
            raise
        finally:
            checkpointer.close()

    def _commit(self, step: int, files: dict[str, bytes]) -> None:
        temporary = self._steps.temporary(step)
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)
        digests.write(temporary)
        self._steps.commit(step)
        good = [s for s in self.steps() if s == step or s not in self._rejected]
        self._steps.keep_only(good[-self._keep :])

    def _finish(self) -> SaveError | None:
        """Waits for the save under way; the error of any process is the error of all."""
        if self._saving is None:
            return None
        (step, future), self._saving = self._saving, None
        error = future.exception()
        if not any(_gathered(b"failed" if error else b"")):
            self._rejected.discard(step)
            return None
        failure = self._save_error(step, reason(error) if error else "another process failed")
        del error, future
        gc.collect()  # Orbax leaves its coroutines, and with them its copy of the arrays, in cycles
        return failure

    def _save_error(self, step: int, why: str) -> SaveError:
        return SaveError(
            f"step {step} in {self._steps.directory}: it could not be saved ({why}; "
            f"{self._free() / 2**20:.0f} MiB are free); older steps are intact, make room"
        )

    def _free(self) -> int:
        return shutil.disk_usage(self._steps.directory).free


def _gathered(content: bytes) -> list[bytes]:
    """Every process's bytes, in the order of the processes."""
    if jax.process_count() == 1:
        return [content]
    with jax.transfer_guard("allow"):
        lengths = multihost_utils.process_allgather(np.int32(len(content)))
        padded = np.zeros(max(lengths.max(), 1), np.uint8)
        padded[: len(content)] = np.frombuffer(content, np.uint8)
        rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
