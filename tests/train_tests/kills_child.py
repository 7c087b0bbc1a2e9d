"""One process of `l32jax train`: `kills_child PORT PROCESS COUNT CONFIG.py [FIELD=VALUE ...]`."""

import sys
from pathlib import Path
from unittest import mock

import jax
from jax._src import compiler, distributed

CACHE = Path(__file__).parents[2] / ".jax_cache"


def main(port: str, process: str, count: str, *train: str) -> int:
    cache = CACHE / f"{process}_of_{count}" if int(count) > 1 else CACHE
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if int(count) > 1:
        connect(f"127.0.0.1:{port}", int(count), int(process))
        write_the_cache_in_every_process()
    from l32jax.__main__ import main

    return main(["train", *train])


def connect(coordinator: str, count: int, process: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, num_processes=count, process_id=process, heartbeat_timeout_seconds=30
    )


def write_the_cache_in_every_process() -> None:
    """JAX writes in process 0 alone, whose programs are not the others'.

    Those would compile each time, while process 0 waits for them, in vain after 30 seconds.
    """
    write = compiler._cache_write

    def write_as_the_first(*args, **kwargs):
        with mock.patch.object(distributed.global_state, "process_id", 0):
            write(*args, **kwargs)

    compiler._cache_write = write_as_the_first


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
