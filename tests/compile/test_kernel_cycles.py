"""The bars that the TPU kernels must hold, by the modelled costs of `benchmarks/attention.py`."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")
pytestmark = pytest.mark.compile

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"

SMALL_KERNEL = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from kernel_cycles import compile_for

def kernel(x, y):
    here = pl.program_id(0)

    @pl.when(here == 0)
    def _():
        y[...] = jnp.zeros_like(y)

    @pl.when(here % 2 == 0)
    def _():
        y[...] += jnp.exp(x[...])

    @pl.when(here == 3)
    def _():
        jax.lax.fori_loop(0, here, lambda i, _: y.__setitem__(..., y[...] * x[...]), None)

def small(x):
    block = lambda place: pl.BlockSpec((256, 128), place)
    return pl.pallas_call(
        kernel, grid=(6,), in_specs=[block(lambda i: (i, 0))], out_specs=block(lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((256, 128), jnp.float32), name="small",
    )(x)

program = compile_for("v5e", small, jax.ShapeDtypeStruct((6 * 256, 128), jnp.float32))
zeros, adds, loop = program.kernel("small").phases
registers = 256 * 128 // 1024
# One store a bundle; the loop's turn stores as much.
assert registers <= zeros.cycles < 2 * registers, zeros
assert zeros.step is None and adds.step is None
assert registers <= loop.step < 4 * registers and loop.cycles < registers, loop
assert adds.usage["EUP"] > 0 and zeros.usage["EUP"] == 0
assert program.kernel("small").trips == 6 + 2  # the pipeline fills and drains
"""


def run(*arguments: str) -> None:
    """In a process of its own: libtpu reads its flags once, when it is loaded."""
    paths = os.pathsep.join(map(str, (BENCHMARKS, BENCHMARKS.parent)))
    child = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]


def test_the_parts_of_a_small_kernel_are_found():
    run("-c", SMALL_KERNEL)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_kernels_cost_no_more_than_the_bars_say(tmp_path):
    found = tmp_path / "costs.json"
    workloads = ("self", "packed", "cross")
    script = str(BENCHMARKS / "attention.py")
    arguments = ("--quick", "--chips", "v5p", "v6e", "--workloads", *workloads)
    run(script, *arguments, "--json", str(found))
    bars = json.loads(found.read_text())["bars"]
    assert len(bars) == 6
    assert not [bar for bar in bars if not bar["value"] <= bar["limit"]]
