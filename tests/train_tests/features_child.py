"""Computes features and kills itself: `python -m tests.train_tests.features_child JSONL FOLDER N`.

N is how many files of JSON it finishes; it dies at the next, of which the content is written.
"""

import os
import signal
import sys
from pathlib import Path

import jax

from l32jax.data import feature_parts, features
from l32jax.data.tokenizer import Tokenizer
from l32jax.sharding import single_device_mesh
from l32jax.train.features import compute_features
from tests.train_tests import cached_stage

CACHE = Path(__file__).parents[2] / ".jax_cache"


def main(source: str, folder: str, lives: str) -> None:
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    write, left = feature_parts.write_json, [None] * int(lives)

    def write_or_die(path: Path, content: dict) -> None:
        if not left:
            path.with_name(f"{path.name}.unfinished").write_bytes(b"{")
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()
        write(path, content)

    feature_parts.write_json = features.write_json = write_or_die
    config, mesh = cached_stage.config(source, folder), single_device_mesh()
    with jax.set_mesh(mesh):
        params = cached_stage.params()
        compute_features(
            config, config.stages[0], Tokenizer.bytes_only(), params, mesh, check_stop=lambda: None
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
