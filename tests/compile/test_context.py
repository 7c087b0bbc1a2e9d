"""Rows over several TPUs: what is sent while the kernels run, and what a row of 131,072 needs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l32jax import kernels

pytest.importorskip("libtpu")
pytestmark = pytest.mark.compile

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
AXES = ("data", "fsdp", "context", "tensor")
MIB = 2**20


def mesh_of(chip: str) -> Mesh:
    """Four chips along the context axis."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    devices = topologies.make_mesh(topology, (1, 1, 4, 1), AXES).devices
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * 4)


def compiled(mesh: Mesh, across: str, length: int, heads: tuple[int, int], *, gradient: bool):
    """Attention of one causal row, or its gradients, shared by two layers."""

    def loss(q, k, v, start, stop):
        plan = kernels.make_plan(start, stop, q, k, impl="tpu", across=across)
        attend = partial(kernels.attention, scale=0.1, impl="tpu", across=across, plan=plan)
        out = attend(q, k, v, start, stop)
        return attend(out, k, v, start, stop).astype(jnp.float32).sum()

    def shaped(dtype, *shape):
        where = NamedSharding(mesh, P(None, "context"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    queries, keys = (shaped(jnp.bfloat16, 1, length, count, 128) for count in heads)
    bound = shaped(jnp.int32, 1, length)
    function = jax.grad(loss, (0, 1, 2)) if gradient else loss
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(queries, keys, keys, bound, bound).compile()


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_keys_are_under_way_while_devices_compute(gradient):
    """Beside the kernel, or beside the merge where XLA deems that long enough."""
    text = compiled(mesh_of("v5p"), "ring", 16_384, (32, 8), gradient=gradient).as_text()
    _, _, sent = text.partition(" collective-permute-start(")
    under_way, _, _ = sent.partition(" collective-permute-done(")
    assert "tpu_custom_call" in under_way or " fusion(" in under_way


@pytest.mark.parametrize("across", ["gather", "ring"])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_a_row_of_131072_tokens_compiles_on_a_context_mesh(chip, across):
    program = compiled(mesh_of(chip), across, 131_072, (8, 2), gradient=True)
    assert program.memory_analysis().peak_memory_in_bytes < 1536 * MIB
