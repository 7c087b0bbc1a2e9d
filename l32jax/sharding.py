"""One alphabet names array dimensions everywhere: in annotations, einsums and shardings.

  b batch row    t query position    s key position    v vocabulary
  d model width  e width of image features             f feed-forward
  n query heads  k key/value heads                     h head dimension
  g query heads that share a key/value head
  i image        c tile              p token of a tile l stacked layer group

The two tables below are the whole parallelism plan. A letter they lack is not sharded.
"""

import dataclasses
import math

import jax
from jax.sharding import Mesh, PartitionSpec

from l32jax.config import MeshConfig
from l32jax.errors import InputError

CONTEXT_AXIS = "context"
PARAM_AXES = {"d": "fsdp", "f": "tensor", "n": "tensor", "k": "tensor", "v": "tensor"}
ACTIVATION_AXES = {
    "b": ("data", "fsdp"),
    "t": CONTEXT_AXIS,
    "f": "tensor",
    "n": "tensor",
    "k": "tensor",
    "v": "tensor",
}


def param_spec(dims: str) -> PartitionSpec:
    return PartitionSpec(*(PARAM_AXES.get(dim) for dim in dims))


def activation_spec(dims: str) -> PartitionSpec:
    return PartitionSpec(*(ACTIVATION_AXES.get(dim) for dim in dims))


def make_mesh(config: MeshConfig = MeshConfig()) -> Mesh:  # noqa: B008  (frozen)
    """A mesh of every device, with explicit axes: shardings are part of array types."""
    sizes = dataclasses.asdict(config)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh {sizes}: sizes are positive, and -1 may stand once")
    if free:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        sizes[free[0]] = max(jax.device_count() // fixed, 1)
    if math.prod(sizes.values()) != jax.device_count():
        raise InputError(f"mesh {sizes} does not cover the {jax.device_count()} devices present")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes))


def single_device_mesh() -> Mesh:
    """The mesh of one device: every sharding is a no-op on it."""
    axes = tuple(field.name for field in dataclasses.fields(MeshConfig))
    return jax.make_mesh((1,) * len(axes), axes, devices=jax.devices()[:1])
