"""What the model of a step's time says of real programs agrees with arithmetic."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l32jax.plan.chips import chip_of
from l32jax.plan.steptime import StepTime, estimate

pytest.importorskip("libtpu")
pytestmark = pytest.mark.compile

TOPOLOGY, AXES = "v5e:2x2", {"fsdp": 4}
TOKENS, WIDTH = 4096, 2048  # tokens of a device


@functools.cache
def mesh() -> Mesh:
    description = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
    return topologies.make_mesh(description, tuple(AXES.values()), tuple(AXES))


@functools.cache
def layers(count: int) -> StepTime:
    """Square products, each with weights that are gathered for it."""

    def layer(x, part):
        return x @ jax.lax.all_gather(part, "fsdp", axis=0, tiled=True), None

    @functools.partial(
        jax.shard_map, mesh=mesh(), in_specs=(P("fsdp"), P(None, "fsdp")), out_specs=P("fsdp")
    )
    def step(x, weights):
        return jax.lax.scan(layer, x, weights)[0]

    def shaped(*dims: int, spec: P):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh(), spec))

    x = shaped(4 * TOKENS, WIDTH, spec=P("fsdp"))
    weights = shaped(count, WIDTH, WIDTH, spec=P(None, "fsdp"))
    text = jax.jit(step).lower(x, weights).compile().as_text()
    assert text is not None
    return estimate(text, chip_of(TOPOLOGY), AXES)


def test_products_take_as_long_as_the_peak_allows():
    flops = 2 * TOKENS * WIDTH**2 * 6
    assert flops / chip_of(TOPOLOGY).peak == pytest.approx(layers(6).matmul, rel=0.25)


def test_time_grows_with_the_layers():
    few, many = layers(2), layers(6)
    assert many.matmul == pytest.approx(3 * few.matmul, rel=1e-6)
    assert many.seconds == pytest.approx(3 * few.seconds, rel=0.15)


def test_every_layer_gathers_its_weights():
    found = layers(6)
    (exchange,) = [one for one in found.exchanges if one.kind == "all-gather"]
    assert exchange.axes == ("fsdp",)
    assert found.exchanges[exchange].count == 6
    assert found.exchanges[exchange].sent == 6 * 2 * WIDTH**2 * 3 / 4
