"""Frozen weights in few bits, as qwix's arrays: integers, and what they are multiplied by.

int4 has a scale for each group of inputs of an output, as the family's own QLoRA models have; int8
has one for each output.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from qwix import QArray

from l32jax.config import Stored
from l32jax.model.matrices import is_projection, matrix_dims
from l32jax.model.parameters import Params, is_quantised, is_stacked, path_name
from l32jax.sharding import activation_spec

TYPES = {"int8": jnp.int8, "int4": jnp.int4}
GROUP = 32  # inputs at most, as in Meta's 1B and 3B
SCALE_DTYPE = jnp.bfloat16  # half a bit for each int4


def frozen_as(stored: Stored, params: Params) -> Params:
    """Parameters as they are kept while they are frozen, sharded as before. Run it inside jit.

    With "int8" or "int4", weights of projections become `qwix.QArray`, one layer at a time, and all
    else bfloat16. A scale is the largest magnitude of its group over 127.5 or 7.5, rounded to
    bfloat16. What is quantised stays as it is.
    """
    dtype = jnp.float32 if stored == "float32" else jnp.bfloat16

    def leaf(path: tuple, weight: Any) -> Any:
        name = path_name(path)
        if is_quantised(weight):
            return weight
        if stored not in TYPES or not is_projection(name):
            return weight.astype(dtype)
        dims = matrix_dims(name, weight.ndim)
        assert dims is not None
        if not is_stacked(name):
            return _quantised(weight, dims.rows, stored)
        rows = [dim - 1 for dim in dims.rows]
        return jax.lax.map(lambda layer: _quantised(layer, rows, stored), weight)

    return jax.tree.map_with_path(leaf, params, is_leaf=is_quantised)


def trainable(params: Params) -> Params:
    """Float32 of all there is, also of what was quantised while it was frozen."""

    def leaf(weight: Any) -> Any:
        if not is_quantised(weight):
            return weight.astype(jnp.float32)
        return _dequantised(weight, jax.typeof(weight.qvalue).sharding.spec, jnp.float32)

    return jax.tree.map(leaf, params, is_leaf=is_quantised)


def dequantised(weight: Array | QArray, dims: str, dtype: Any) -> Float[Array, "*dims"]:
    """A weight as products take it, in `dtype`; devices give each other the integers.

    Args:
      dims: its letters, see `sharding`.
    """
    if not isinstance(weight, QArray):
        return weight.astype(dtype)
    return _dequantised(weight, activation_spec(dims), dtype)


def _dequantised(weight: QArray, spec: PartitionSpec, dtype: Any) -> Array:
    scale = jax.sharding.reshard(weight.scale, _dividing(spec, weight.scale.shape))
    values = jax.sharding.reshard(weight.qvalue, _by_groups(spec, weight.shape, weight.scale.shape))
    whole = qwix.dequantize(QArray(values, scale, qtype=weight.qtype).astype(dtype))
    return jax.sharding.reshard(whole, spec)


def group_size(size: int) -> int:
    """Of inputs that share a scale: the most that leave none over."""
    return next(group for group in range(min(GROUP, size), 0, -1) if size % group == 0)


def _quantised(weight: Array, rows: Collection[int], stored: Stored) -> QArray:
    *lead, last = weight.shape
    if stored == "int8":
        shape = tuple(size if dim in rows else 1 for dim, size in enumerate(weight.shape))
    else:
        shape = (*lead, last // group_size(last))
    channels = [dim for dim, size in enumerate(shape) if size == weight.shape[dim]]
    groups = {dim: last // size for dim, size in enumerate(shape) if 1 < size < weight.shape[dim]}
    spec = jax.typeof(weight).sharding.spec
    found = qwix.quantize(
        jax.sharding.reshard(weight, _by_groups(spec, weight.shape, shape)).astype(jnp.float32),
        TYPES[stored],
        channelwise_axes=channels,
        tiled_axes=groups,
        scale_dtype=SCALE_DTYPE,
    )
    scale = jax.sharding.reshard(found.scale, _dividing(spec, shape))
    return QArray(jax.sharding.reshard(found.qvalue, spec), scale, qtype=found.qtype)


def _by_groups(spec: PartitionSpec, shape: Sequence[int], groups: Sequence[int]) -> PartitionSpec:
    """Of a weight whose groups are to be whole on each device."""
    return _dividing(spec, [n if n > 1 else size for size, n in zip(shape, groups, strict=True)])


def _dividing(spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
    """Without the axes that do not divide their dimension."""
    axes = jax.sharding.get_abstract_mesh().shape

    def devices(part: str | tuple[str, ...] | None) -> int:
        names = (part,) if isinstance(part, str) else part or ()
        return math.prod(axes[name] for name in names)

    whole = (*spec, *[None] * (len(shape) - len(spec)))
    kept = (None if n % devices(part) else part for part, n in zip(whole, shape, strict=True))
    return PartitionSpec(*kept)
