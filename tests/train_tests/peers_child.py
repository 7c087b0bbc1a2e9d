"""Steps that all processes have a part in: `peers_child PORT PROCESS COUNT FOLDER WHO HOW...`.

After two hundred steps process WHO does HOW; "saved" after it says that something was saved.
A process that comes to the end of its steps has stopped because it was asked to: code 75.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from l32jax.errors import InputError
from l32jax.train.board import open_board
from l32jax.train.ending import restart_from
from l32jax.train.peers import watched
from l32jax.train.stopping import Stop
from tests.train_tests.kills_child import connect

STEPS, STEP_SECONDS = 100, 0.01
SIGNALS = {"die": signal.SIGKILL, "freeze": signal.SIGSTOP, "stop": signal.SIGTERM}


def main(port: str, process: str, count: str, folder: str, who: str, *how: str) -> int:
    connect(f"127.0.0.1:{port}", int(count), int(process))
    mesh = jax.make_mesh((int(count),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    ones = jax.make_array_from_process_local_data(sharding, np.ones(1, np.float32))
    total = jax.jit(lambda array: array.sum())
    what, saved = how[0], how[1:]
    board, steps = open_board(), 0
    assert board is not None
    stop, restart = Stop(board), restart_from(lambda: bool(saved) and steps > STEPS)
    with (
        jax.set_mesh(mesh),
        watched(board, restart, Path(folder)) as peers,
        stop.listening(),
        peers.blamed(),
    ):
        before = total(ones)
        while not stop.after_step():
            after = total(ones)
            before.block_until_ready()
            before, steps = after, steps + 1
            time.sleep(STEP_SECONDS)
            if steps == 2 * STEPS and who == process:
                do(what)
    print(f"stopped after {steps}", flush=True)
    return 75


def do(what: str) -> None:
    if what == "fail":
        raise RuntimeError("out of memory, say")
    if what == "refuse":
        raise InputError("record 7 of it: no text; mend it")
    os.kill(os.getpid(), SIGNALS[what])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
