"""Gradients of a batch that is too large for the devices, a part of its rows at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Key

from l32jax.errors import InputError
from l32jax.model.llama import Batch
from l32jax.model.parameters import Params
from l32jax.run_config import StageConfig
from l32jax.sharding import row_parts

SumOverRows = Callable[[Params, Batch, Key[Array, ""]], tuple[Array, Any]]


def summed_gradients(
    loss: SumOverRows, params: Params, batch: Batch, rng: Key[Array, ""], num_parts: int
) -> tuple[Params, Any]:
    """Float32 gradients of a sum over rows, and the other sums that come with it."""

    def of_part(rows: Batch, rng: Key[Array, ""]) -> tuple[Params, Any]:
        grads, sums = jax.grad(loss, has_aux=True)(params, rows, rng)
        return jax.tree.map(lambda grad: grad.astype(jnp.float32), grads), sums

    if num_parts == 1:
        return of_part(batch, rng)

    def add(total, part):
        rows, number = part
        found = of_part(rows, jax.random.fold_in(rng, number))
        return jax.tree.map(jnp.add, total, found), None

    parts = {name: _split(array, num_parts) for name, array in batch.items()}
    first = {name: array[0] for name, array in parts.items()}
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, first, rng))
    return jax.lax.scan(add, nothing, (parts, jnp.arange(num_parts)))[0]


def require_even_rows(stage: StageConfig, axes: Mapping[str, int]) -> None:
    """InputError unless every device has as many rows in every microbatch.

    Args:
      axes: of the mesh, their sizes.
    """
    devices = row_parts(axes)
    if stage.data.batch_size % (devices * stage.accumulate):
        raise InputError(
            f"batch_size={stage.data.batch_size} of stage {stage.name!r}: it must be a multiple of "
            f"{devices * stage.accumulate}, as {devices} devices share the rows of each of "
            f"{stage.accumulate} microbatches; change it, accumulate, or the mesh"
        )


def _split(array: Array, num_parts: int) -> Array:
    """[part b ...]: each device keeps its rows, and has as many of every part."""
    spec = jax.typeof(array).sharding.spec
    dealt = PartitionSpec(spec[0], None, *spec[1:])
    shape = (array.shape[0] // num_parts, num_parts, *array.shape[1:])
    return array.reshape(shape, out_sharding=dealt).swapaxes(0, 1)
