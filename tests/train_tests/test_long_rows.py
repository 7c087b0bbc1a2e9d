"""Training memory is linear in the length of rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GIB = 2**30


def train(impl: str, length: int, *options: str) -> dict:
    """In a process of its own, whose peak memory is the step's."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.train_tests.long_row_child", impl, str(length), *options],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_row_of_16384_tokens_trains_in_under_3_gb_where_the_dense_form_cannot():
    ours = train("reference", 16_384)
    assert ours["losses"][1] < ours["losses"][0]
    assert ours["peak"] < 3 * GIB
    assert train("xla", 16_384, "plan")["planned"] > 3 * GIB


@pytest.mark.slow
def test_memory_grows_as_the_row_does():
    short, long = (train("reference", length, "plan")["planned"] for length in (4096, 16_384))
    assert long < 4.5 * short
