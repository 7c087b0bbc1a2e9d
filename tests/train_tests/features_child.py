"""Computes features: `python -m tests.train_tests.features_child JSONL FOLDER N [PORT PROCESS]`.

N is how many files of JSON it finishes before it kills itself, in the middle of the next. With a
port it is one of two processes.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax

from l32jax.config import MeshConfig
from l32jax.data import feature_parts, features
from l32jax.data.tokenizer import Tokenizer
from l32jax.sharding import make_mesh, single_device_mesh
from l32jax.train.features import compute_features
from tests.checkpoint_tests.weights import random_params
from tests.train_tests import cached_stage
from tests.train_tests.small import MODEL

CACHE = Path(__file__).parents[2] / ".jax_cache"


def main(source: str, folder: str, lives: str, port: str = "", process: str = "") -> None:
    if not port:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    else:
        # Cut to 32 bits, as JAX cuts numbers, this is a negative one.
        shutil.disk_usage = lambda _: SimpleNamespace(free=2**36 + 2**31)
        # Without a cache: one of them would find what the other compiles, and gloo waits 30 s.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    write, left = feature_parts.write_json, [None] * int(lives)

    def write_or_die(path: Path, content: dict) -> None:
        if not left:
            path.with_name(f"{path.name}.unfinished").write_bytes(b"{")
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()
        write(path, content)

    feature_parts.write_json = features.write_json = write_or_die
    config = cached_stage.config(source, folder)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1)) if port else single_device_mesh()
    with jax.set_mesh(mesh):
        params = random_params(MODEL, mesh)
        compute_features(
            config, config.stages[0], Tokenizer.bytes_only(), params, mesh, stops=lambda: False
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
