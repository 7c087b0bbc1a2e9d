"""Processes that write the native format until they are killed.

`python converting_child.py <directory>` forks one for each line that it reads; the line says
whether to resume. It prints the process id, then "ended". The parameters are those of `slices`.
"""

import os
import sys
import time
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np

from l32jax.checkpoint import native, native_write
from l32jax.checkpoint.engine import transfer
from l32jax.checkpoint.engine.slices import Home, Slices

SHAPES = {
    "decoder/embedding/weight": (1024, 64),
    "decoder/groups/blocks/0/mlp/up/weight": (9, 256, 64),
    "decoder/groups/blocks/0/mlp_norm/scale": (9, 64),
}


def slices() -> Slices:
    """Values that tell their place, from a source that takes its time."""

    def read(home: Home, rows: slice) -> np.ndarray:
        shape = SHAPES[home.path] if home.layer is None else SHAPES[home.path][1:]
        time.sleep(0.03)
        values = np.arange(np.prod(shape)).reshape(shape) % 251 + (home.layer or 0)
        return values[rows].astype(ml_dtypes.bfloat16)

    return Slices("memory", SHAPES, dict.fromkeys(SHAPES, np.dtype(ml_dtypes.bfloat16)), read)


def convert(directory: Path, *, resume: bool) -> None:
    native_write.CHUNK_BYTES, native_write.UNIT_BYTES = 8 << 10, 40 << 10
    output = native.plan(slices(), "{}", {"a": b"b"}, {"format": "native"})
    transfer.write(output, directory, {"of": "the test"}, resume=resume)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="os.fork")
    for line in sys.stdin:
        if (process := os.fork()) == 0:
            convert(Path(sys.argv[1]), resume=line.strip() == "resume")
            os._exit(0)
        print(process, flush=True)
        os.waitpid(process, 0)
        print("ended", flush=True)
