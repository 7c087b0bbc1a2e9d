"""Trains what a JSON file says: `python -m tests.train_tests.kills_child FILE [PORT PROCESS]`."""

import sys
from pathlib import Path
from unittest import mock

import jax
from jax._src import compiler, distributed

CACHE = Path(__file__).parents[2] / ".jax_cache"


def main(config_file: str, port: str = "", process: str = "") -> None:
    jax.config.update("jax_compilation_cache_dir", str(CACHE / process))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if port:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
        write_the_cache_in_every_process()
    from l32jax import api
    from l32jax.config_text import from_json
    from l32jax.run_config import TrainConfig

    api.run(from_json(TrainConfig, Path(config_file).read_text()))


def write_the_cache_in_every_process() -> None:
    """JAX writes in process 0 alone, whose programs are not the other's.

    That one would compile each time, while process 0 waits for it, in vain after 30 seconds.
    """
    write = compiler._cache_write

    def write_as_the_first(*args, **kwargs):
        with mock.patch.object(distributed.global_state, "process_id", 0):
            write(*args, **kwargs)

    compiler._cache_write = write_as_the_first


if __name__ == "__main__":
    main(*sys.argv[1:])
