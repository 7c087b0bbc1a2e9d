"""Writes a model slowly, so that the test which started this can kill it: DESTINATION [resume]."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from l32jax.checkpoint import own_safetensors
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.transfer import write
from tests import golden
from tests.checkpoint_tests.weights import random_params

SECONDS = 0.01  # a read


def main() -> None:
    slices = Slices.of(random_params(golden.VISION))

    def read(home, rows) -> np.ndarray:
        time.sleep(SECONDS)
        return slices.read(home, rows)

    output = own_safetensors.plan(replace(slices, read=read), golden.VISION, about={"format": "x"})
    print("begun", flush=True)
    write(output, Path(sys.argv[1]), {"of": "vision"}, resume="resume" in sys.argv)


if __name__ == "__main__":
    main()
