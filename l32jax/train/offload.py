"""Arrays that wait in the host's memory, which is larger than the devices'."""

from typing import Any

import jax
from jax.sharding import NamedSharding

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def in_memory(space: Any, tree: Any) -> Any:
    """Inside jit: the arrays over there, each shard beside its device. Scalars stay."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, tree)


def abstract_in_host_memory(tree: Any) -> Any:
    """The same of shapes with shardings; `jax.eval_shape` forgets which memory an array is in."""

    def moved(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = leaf.sharding
        assert isinstance(where, NamedSharding)
        host = NamedSharding(where.mesh, where.spec, memory_kind="pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)

    return jax.tree.map(lambda leaf: moved(leaf) if leaf.ndim else leaf, tree)
