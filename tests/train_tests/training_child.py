"""Processes that train a run, and are stopped on the way.

`python training_child.py` forks one for each line of JSON that it reads, {"config": TrainConfig,
"log": a file to append to, "hold": [stage, step] or null}, and prints its process id; forking,
before JAX has started, spares the imports. Before the step that it is to hold at, a process prints
"holding" and waits for a line. The log gets a line for each batch that a step is given, and, when
all is done, for each leaf of the final states.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import jax
import numpy as np

from l32jax.config_text import from_json
from l32jax.data.tokenizer import Tokenizer
from l32jax.model.parameters import flatten
from l32jax.run_config import TrainConfig
from l32jax.sharding import single_device_mesh
from l32jax.train import loop

CACHE = Path(__file__).parents[2] / ".jax_cache"


def digest(arrays: dict) -> str:
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(name.encode() + np.asarray(array).tobytes())
    return found.hexdigest()


def run(config: TrainConfig, log: Path, hold: list | None) -> None:
    """Trains through the real loop, with witnesses at its step and at the end of its stages."""
    stage_step, run_stage = loop.stage_step, loop.run_stage

    def tell(record: dict) -> None:
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def witnessed_step(config, number):
        step, stage = stage_step(config, number), config.stages[number]

        def stepping(state, batch, rate):
            place = [stage.name, int(state.step)]
            if place == hold:
                print("holding", flush=True)
                sys.stdin.readline()
            tell({"batch": place, "sha256": digest(batch)})
            return step(state, batch, rate)

        return stepping

    def witnessed_stage(config, number, *rest):
        state, stage = run_stage(config, number, *rest), config.stages[number]
        for name, leaf in flatten(state._asdict()).items():
            tell({"leaf": [stage.name, name], "sha256": digest({"": leaf})})
        return state

    loop.stage_step, loop.run_stage = witnessed_step, witnessed_stage
    try:
        loop.train(config, Tokenizer.bytes_only(), None, single_device_mesh())
    except loop.Interrupted as interrupted:
        tell({"interrupted": str(interrupted)})


def configure() -> None:
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)


def serve() -> None:
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if (process := os.fork()) == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            config = from_json(TrainConfig, json.dumps(request["config"]))
            run(config, Path(request["log"]), request["hold"])
            return
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="os.fork")
    configure()
    serve()
