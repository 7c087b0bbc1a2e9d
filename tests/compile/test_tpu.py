"""The TPU kernels through the real TPU compiler, for chips that are not here.

Everything that a chip could refuse is checked: tiling, vector memory, scalar memory, and what of
its main memory a call takes at most.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from l32jax.kernels.tpu.backward import backward
from l32jax.kernels.tpu.chips import LANES
from l32jax.kernels.tpu.forward import forward

pytest.importorskip("libtpu")
pytestmark = pytest.mark.compile

TOPOLOGIES = {
    "v4": dict(topology_name="v4:2x2x1", chip_config_name="megacore"),
    "v5e": dict(topology_name="v5e:2x2"),
    "v5p": dict(topology_name="v5p:2x2x1"),
    "v6e": dict(topology_name="v6e:2x2"),
    "tpu7x": dict(topology_name="tpu7x:2x2x1"),
}


class Problem(NamedTuple):
    """Of one batch row; letters as in the kernels."""

    k: int
    g: int
    t: int
    s: int
    h: int
    dtype: type = jnp.bfloat16


PROBLEMS = {
    "text, heads of 128": Problem(k=8, g=4, t=8192, s=8192, h=128),
    "text, 24 heads of the 3B model": Problem(k=8, g=3, t=8192, s=8192, h=128),
    "short text, heads of 64": Problem(k=2, g=2, t=300, s=300, h=64),
    "text, heads of 64": Problem(k=8, g=4, t=8192, s=8192, h=64),
    "text, 131072 tokens": Problem(k=2, g=4, t=131072, s=131072, h=128),
    "vision tower": Problem(k=16, g=1, t=6432, s=6432, h=80),
    "cross-attention": Problem(k=8, g=4, t=8192, s=5 * 6404, h=128),
    "float32": Problem(k=8, g=4, t=2048, s=2048, h=128, dtype=jnp.float32),
}
COMPILED = [(chip, name) for chip in ("v5e", "v5p", "v6e") for name in PROBLEMS]
COMPILED += [(chip, "text, heads of 128") for chip in ("v4", "tpu7x")]


@functools.cache
def device(chip: str):
    return topologies.get_topology_desc(platform="tpu", **TOPOLOGIES[chip]).devices[0]


def operands(problem: Problem, sharding) -> tuple[list, list]:
    """What the forward pass takes, and what the backward pass takes besides."""
    k, g, t, s, h, dtype = problem

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((1, *shape), dtype, sharding=sharding)

    q, keys = array(k, g, t, h), array(k, s, h)
    bound, row_value = array(t, dtype=jnp.int32), array(k, g, t, dtype=jnp.float32)
    return [q, keys, keys, bound, bound], [row_value, row_value, q]


def compiled(function, arguments: list, chip: str):
    mesh = Mesh(np.array([device(chip)]), ("x",)).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(functools.partial(function, scale=0.1)).lower(*arguments).compile()


def size(arrays) -> int:
    """In bytes, where heads are filled up to whole lanes."""
    whole = (
        (*a.shape[:-1], -(-a.shape[-1] // LANES) * LANES) if a.ndim > 3 else a.shape for a in arrays
    )
    return sum(np.prod(shape) * a.dtype.itemsize for shape, a in zip(whole, arrays, strict=True))


def assert_linear(program, arguments: list) -> None:
    """No more memory than 2.1 times that of arguments and results."""
    peak = program.memory_analysis().peak_memory_in_bytes
    assert 0 < peak < 2.1 * size(arguments + jax.tree.leaves(program.out_info))


@pytest.mark.parametrize(("chip", "name"), COMPILED)
def test_forward_compiles_in_linear_memory(chip, name):
    arguments, _ = operands(PROBLEMS[name], SingleDeviceSharding(device(chip)))
    assert_linear(compiled(forward, arguments, chip), arguments)


@pytest.mark.parametrize(("chip", "name"), COMPILED)
def test_backward_compiles_in_linear_memory(chip, name):
    arguments, more = operands(PROBLEMS[name], SingleDeviceSharding(device(chip)))
    assert_linear(compiled(backward, arguments + more, chip), arguments + more)
