"""What is saved for the backward pass."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from l32jax.model.layers import Projection
from l32jax.model.remat import remat
from l32jax.sharding import single_device_mesh

WIDTH, HIDDEN = 8, 24


def saved_shapes(saved: str) -> list[tuple]:
    """Dtypes and shapes of what two products with a sine between keep of a row."""
    with jax.set_mesh(single_device_mesh()):
        sizes, rngs = {"d": WIDTH, "f": HIDDEN}, nnx.Rngs(0)
        up, down = Projection(sizes, "d", "f", rngs=rngs), Projection(sizes, "f", "d", rngs=rngs)
        body = remat(lambda x, up, down: down(jnp.sin(up(x))), saved)
        x = jnp.ones((2, 5, WIDTH), jnp.bfloat16)
        _, back = jax.vjp(body, x, up, down)
        return [(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(back) if leaf.ndim == 3]


@pytest.mark.parametrize(("saved", "hidden"), [("dots", 1), ("attention", 0), ("nothing", 0)])
def test_products_are_saved_in_the_dtype_of_activations(saved, hidden):
    """They are accumulated in float32, which is twice as much."""
    found = saved_shapes(saved)
    assert [shape for dtype, shape in found if dtype == "float32"] == []
    assert found.count(("bfloat16", (2, 5, HIDDEN))) == hidden
