"""Trains what a JSON file says: `python -m tests.train_tests.kills_child FILE [PORT PROCESS]`."""

import sys
from pathlib import Path

import jax

CACHE = Path(__file__).parents[2] / ".jax_cache"


def main(config_file: str, port: str = "", process: str = "") -> None:
    if not port:  # of two processes only one would find programs there; the other waits in vain
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    else:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    from l32jax import api
    from l32jax.config_text import from_json
    from l32jax.run_config import TrainConfig

    api.run(from_json(TrainConfig, Path(config_file).read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
