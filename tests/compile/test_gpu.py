"""The GPU kernels are lowered for CUDA, and where its plugin and ptxas are, compiled to the end."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import gpu_registers
from l32jax.plan.cuda import GPUS, missing

pytestmark = pytest.mark.compile

KERNELS = ["flash_dkv", "flash_dq", "flash_forward"]


@pytest.mark.parametrize("shape", gpu_registers.SHAPES)
def test_every_shape_lowers_to_three_kernels(shape):
    text = gpu_registers.lower(shape, GPUS["h100"]).as_text()
    assert sorted(re.findall(r'name = "(flash_\w+)"', text)) == KERNELS


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=str(missing()))
def test_no_kernel_spills_registers_on_an_h100():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_registers", "h100"],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = re.findall(r"\| (\w+) \| (flash_\w+) \| \d+ \| \d+ \| (\d+) \| (\d+) \|", run.stdout)
    assert sorted({name for name, *_ in rows}) == sorted(gpu_registers.SHAPES)
    assert len(rows) == len(gpu_registers.SHAPES) * len(KERNELS)
    for name, kernel, spilled, shared in rows:
        assert (int(spilled), int(shared) <= 227) == (0, True), (name, kernel)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=str(missing()))
def test_the_memory_of_a_plan_is_the_compilers(tmp_path):
    """And near that of the arithmetic, which stands in where there is no compiler."""
    command = [sys.executable, "-m", "l32jax", "plan", "configs/text_1b.py"]
    command += ["--topology", "h100:1x8", "stages.0.data.batch_size=16", "--json"]
    plans = []
    for name, environ in (("with", {}), ("without", {"PATH": "", "CUDA_HOME": ""})):
        subprocess.run(
            [*command, tmp_path / name],
            cwd=pathlib.Path(__file__).parents[2],
            env=os.environ | environ,
            check=True,
        )
        plans.append(json.loads((tmp_path / name).read_text()))
    found, reckoned = plans
    assert (found["arithmetic"], reckoned["arithmetic"]) == (["time"], ["memory", "time"])
    assert found["memory"]["params"] == pytest.approx(reckoned["memory"]["params"], rel=0.01)
    assert found["memory"]["peak"] == pytest.approx(reckoned["memory"]["peak"], rel=0.15)
    assert found["time"] == reckoned["time"]
