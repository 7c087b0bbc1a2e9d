"""What remat policies save is not computed again in the compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from l32jax import kernels
from l32jax.model.remat import REMAT_POLICIES

pytestmark = pytest.mark.compile


def kernel_calls(saved: str) -> dict[str, int]:
    """How often each kernel runs in the gradient of two layers."""
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES[saved])
    def layer(x, start, stop):
        x = x * 2
        keys = x[:, :, :2]
        return kernels.attention(x, keys, keys, start, stop, scale=0.1, impl="tpu")

    def loss(x, start, stop):
        return layer(layer(x, start, stop), start, stop).astype(jnp.float32).sum()

    where = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((1, 1024, 8, 128), jnp.bfloat16, sharding=where)
    bound = jax.ShapeDtypeStruct((1, 1024), jnp.int32, sharding=where)
    mesh = Mesh(np.array([device]), ("one",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(jax.grad(loss)).lower(x, bound, bound).compile().as_text()
    assert text is not None
    names = ("attention_forward", "attention_backward")
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    return {name: sum(f"%{name}" in line.split(" = ")[0] for line in calls) for name in names}


# Where nothing is saved the last layer's second forward pass follows at once upon the first, and
# XLA makes one of the two.
@pytest.mark.parametrize(("saved", "forward"), [("attention", 2), ("dots", 2), ("nothing", 3)])
def test_the_forward_kernel_runs_again_only_where_nothing_is_saved(saved, forward):
    assert kernel_calls(saved) == {"attention_forward": forward, "attention_backward": 2}
