"""The GPU kernels are lowered for CUDA, and where its plugin and ptxas are, compiled to the end."""

import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import gpu_registers

pytestmark = pytest.mark.compile

KERNELS = ["flash_dkv", "flash_dq", "flash_forward"]


@pytest.mark.parametrize("shape", gpu_registers.SHAPES)
def test_every_shape_lowers_to_three_kernels(shape):
    text = gpu_registers.lower(shape, gpu_registers.GPUS["H100"]).as_text()
    assert sorted(re.findall(r'name = "(flash_\w+)"', text)) == KERNELS


@pytest.mark.slow
@pytest.mark.skipif(bool(gpu_registers.missing()), reason=str(gpu_registers.missing()))
def test_no_kernel_spills_registers_on_an_h100():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_registers", "H100"],
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
