"""Ends a process whose steps have come to a stand, so that launchers start the run again.

A step that hangs, in a collective or in a driver, raises nothing and cannot be interrupted. What
all threads were at is written into the run's folder.
"""

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from l32jax.run_config import TrainConfig
from l32jax.train.ending import Restart, leave, own_host
from l32jax.train.goodput import Clock

TIMES = 10.0  # so many usual steps are never too long for one
LOOKS = 20  # within the time that is allowed


@contextmanager
def watchdog(
    config: TrainConfig,
    clock: Clock,
    restart: Restart,
    tell: Callable[[str, int], None] | None = None,
) -> Iterator[None]:
    """Around a run. Compiling, saving and restoring may take as long as they do.

    Args:
      tell: to be called before the end with why, and the exit code.
    """
    done, hung_after = threading.Event(), config.hung_after

    def watch() -> None:
        looked = time.monotonic()
        while not done.wait(hung_after / LOOKS):
            slept, looked = time.monotonic() - looked, time.monotonic()
            if slept > hung_after / 2:
                clock.excuse()  # the whole process was stopped
            elif (stood := clock.seconds_in_step()) > max(hung_after, TIMES * clock.usual_step):
                _end(Path(config.directory), stood, restart, tell)

    thread = threading.Thread(target=watch, daemon=True, name="watchdog")
    if hung_after:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if hung_after:
            thread.join()


def _end(
    directory: Path, stood: float, restart: Restart, tell: Callable[[str, int], None] | None
) -> None:
    number = jax.process_index()
    stacks = directory / f"hung_{number}.txt"
    with stacks.open("a") as file:
        file.write(f"{time.ctime()}: no step has ended for {stood:.0f} s\n")
        faulthandler.dump_traceback(file, all_threads=True)
    code, advice = restart()
    why = f"no step has ended for {stood:.0f} s; its stacks are in {stacks}"
    if tell is not None:
        tell(why, code)
    leave(f"process {number} on {own_host()} hangs: {why}; {advice}", code)
