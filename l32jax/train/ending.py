"""Ending a process at once, and with which code: for what cannot be left by way of an exception.

A process that waits in a step for another that has gone does not come back from there, and neither
does one that would wait for it at the exit.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from l32jax import cluster

FAILED, REFUSED, RESTART = 1, 2, 75  # something broke; the input is at fault; go on with me


def own_host() -> str:
    """The name of this process's host."""
    hosts = cluster.hosts()
    return hosts[jax.process_index() % len(hosts)]


def leave(line: str, code: int) -> NoReturn:
    """Tells one line, stops the workers, and ends the process wherever its threads are."""
    print(f"l32jax: {line}", file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


Restart = Callable[[], tuple[int, str]]


def restart_from(newest_save: Callable[[], Any]) -> Restart:
    """How to end for want of something that may be there next time: the code, and a word of advice.

    What has saved nothing since it was started is no better off by being started again: that counts
    as a failure, of which launchers allow only so many.

    Args:
      newest_save: gives another value than now when more of the run is saved.
    """
    before = newest_save()

    def restart() -> tuple[int, str]:
        if newest_save() != before:
            return RESTART, "the same command goes on from what is saved"
        return FAILED, "nothing was saved since the start: if it happens again, look at that host"

    return restart
