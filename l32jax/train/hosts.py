"""Which host holds a run up, or computes something else: told once it is plain.

A step takes all hosts the same time, as each waits for the slowest. What differs is how long a host
takes by itself, for its rows and for dispatching, while the devices have nothing to wait for but
that. A slow chip does not show in it. All hosts are given the same loss, to the last bit: who has
another one computes wrongly.
"""

import logging
import os
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from l32jax import cluster
from l32jax.train import journal

FILE = "hosts.jsonl"
SLOW, SHARE, TIMES = 1.5, 0.2, 3  # times the median; of a step's time; in a row

logger = logging.getLogger(__name__)


class Hosts:
    """Compares the processes of a run, now and then; the first one tells and keeps what it finds.

    All processes make one, and call it together. Alone, a process has nobody to be compared with.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._slow: list[int | None] = []

    def compare(self, step: int, own: float, whole: float, loss: jax.Array) -> dict[str, float]:
        """Numbers for the metrics.

        Args:
          own: seconds of a step that this process takes by itself.
          whole: seconds of a step.
          loss: of the step, as the devices of this process have it.
        """
        if jax.process_count() == 1:
            return {}
        bits = int(np.asarray(loss.addressable_data(0), np.float32).view(np.int32))
        with jax.transfer_guard("allow"):
            seconds = multihost_utils.process_allgather(np.float32(own))
            losses = multihost_utils.process_allgather(np.int32(bits))
        self._slow = [*self._slow, slow(seconds, whole)][-TIMES:]
        number = self._slow[-1]
        if number is not None and self._slow == [number] * TIMES:
            self._tell(
                step,
                number,
                f"takes {seconds[number]:.3g} s of a step by itself, the "
                f"others {np.median(seconds):.3g} s",
            )
            self._slow = []
        for number in different(losses):
            self._tell(step, number, "was given another loss than the others: it computes wrongly")
        return {
            "hosts/slowest_s": float(seconds.max()),
            "hosts/median_s": float(np.median(seconds)),
        }

    def _tell(self, step: int, number: int, what: str) -> None:
        if jax.process_index() == 0:
            name = name_of(number)
            logger.warning("process %d on %s %s", number, name, what)
            record(self._directory, {"step": step, "process": number, "host": name, "what": what})


def slow(seconds: np.ndarray, whole: float) -> int | None:
    """The process that takes longest by itself, if that is far more than usual, and matters."""
    number = int(seconds.argmax())
    usual = float(np.median(np.delete(seconds, number)))
    return number if seconds[number] > max(SLOW * usual, usual + SHARE * whole) else None


def different(losses: np.ndarray) -> list[int]:
    """Those that have not what most have; of two that differ nobody knows which is wrong."""
    values, counts = np.unique(losses, return_counts=True)
    if len(values) == 1:
        return []
    if counts.max() * 2 <= len(losses):
        return list(range(len(losses)))
    return np.flatnonzero(losses != values[counts.argmax()]).tolist()


def name_of(process: int) -> str:
    """Of the host of a process."""
    hosts = cluster.hosts()
    return hosts[process] if len(hosts) == jax.process_count() else "its host"


def record(directory: Path, told: dict[str, int | str]) -> None:
    """A line in the run's folder, that is there when the process ends now."""
    with journal.open_to_append(directory / FILE) as file:
        journal.append(file, {"time": time.time()} | told)
        os.fsync(file.fileno())
