"""Images one behind the other, whatever row they are of: devices of a row share them.

The devices that share a row (the mesh axis "context") would otherwise encode all images of it each.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from l32jax.sharding import ACTIVATION_AXES, CONTEXT_AXIS, activation_spec, row_parts


def by_image(array: Array) -> Array:
    """[b i *rest] -> [j *rest]; empty images at the end of a row make their number even.

    j is in the order in which devices have them, not in that of rows: only `by_row` knows it.
    """
    rows, shares = _sizes()
    batch, images, *rest = array.shape
    array = jnp.pad(array, [(0, 0), (0, -images % shares), *[(0, 0)] * len(rest)])
    local = (rows, batch // rows, shares, array.shape[1] // shares)
    of_rows, of_images = ACTIVATION_AXES["b"], CONTEXT_AXIS
    array = jax.sharding.reshard(array, PartitionSpec(of_rows, of_images))
    spec = PartitionSpec(of_rows, None, of_images)
    array = array.reshape(*local, *rest, out_sharding=spec).swapaxes(1, 2)
    return array.reshape(math.prod(local), *rest, out_sharding=activation_spec("j"))


def by_row(array: Array, shape: tuple[int, ...]) -> Array:
    """Back again: [j *rest] -> [b i *rest], all images of a row on each of its devices.

    Args:
      shape: begins with (b, i).
    """
    rows, shares = _sizes()
    (batch, images), (_, *rest) = shape[:2], array.shape
    padded = images + -images % shares
    local = (rows, shares, batch // rows, padded // shares)
    spec = PartitionSpec(ACTIVATION_AXES["b"], CONTEXT_AXIS)
    array = array.reshape(*local, *rest, out_sharding=spec).swapaxes(1, 2)
    array = array.reshape(batch, padded, *rest, out_sharding=spec)
    return jax.sharding.reshard(array, activation_spec("b"))[:, :images]


def _sizes() -> tuple[int, int]:
    """Devices that have different rows, and those that share one."""
    axes = jax.sharding.get_abstract_mesh().shape
    return row_parts(axes), axes[CONTEXT_AXIS]
