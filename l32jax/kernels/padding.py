"""Lengths that are multiples of their blocks."""

import jax.numpy as jnp
from jaxtyping import Array


def pad(array: Array, dim: int, multiple: int, value: float = 0) -> Array:
    """`array` with as many of `value` behind it along `dim` as whole blocks need."""
    widths = [(0, 0)] * array.ndim
    widths[dim] = (0, -array.shape[dim] % multiple)
    return jnp.pad(array, widths, constant_values=value)
