"""Adafactor's second moments (Shazeer and Stern, 2018): of rows and of columns, not of entries."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from l32jax.model.matrices import MatrixDims, matrix_dims
from l32jax.model.parameters import Params, is_stacked, path_name

TINY = 1e-30  # of a matrix whose gradients are zeros, the moments are too
MAX_UPDATE = 1.0  # its root mean square, by the matrix: factors miss single large entries


class FactoredState(NamedTuple):
    """Moving means of squared gradients: over the columns of a matrix, and over its rows.

    What is no matrix has all of them in `rows`, and no leaf in `columns`.
    """

    count: Int[Array, ""]
    rows: Params
    columns: Params


def scale_by_factored_moments(decay: float, epsilon: float) -> optax.GradientTransformation:
    """Adam's division by the root of second moments, those of a matrix as a product of two vectors.

    As in Adam, their start at zero is corrected for. Each layer of a stack is by itself.
    """

    def init(params: Params) -> FactoredState:
        return FactoredState(jnp.int32(0), *jax.tree.map(jnp.zeros_like, _means(params)))

    def update(updates: Params, state: Any, params: Params | None = None):
        del params
        count = state.count + 1
        rows, columns = jax.tree.map(
            lambda new, old: decay * old + (1 - decay) * new,
            _means(jax.tree.map(jnp.square, updates)),
            (state.rows, state.columns),
        )
        correction = 1 - decay**count

        def scaled(dims, layer, grad, rows, columns):
            second = _second_moments(dims, rows, columns) / correction
            update = grad / (jnp.sqrt(second) + epsilon)
            size = jnp.sqrt(jnp.mean(update**2, axis=layer, keepdims=True))
            return update / jnp.maximum(size / MAX_UPDATE, 1)

        return _map(scaled, updates, rows, columns), FactoredState(count, rows, columns)

    return optax.GradientTransformation(init, update)


def _means(squares: Params) -> tuple[Params, Params]:
    """Over columns, a number for each row; and over rows."""
    return (
        _map(lambda dims, _, leaf: leaf.mean(dims.columns) if dims else leaf, squares),
        _map(lambda dims, _, leaf: leaf.mean(dims.rows) if dims else None, squares),
    )


def _second_moments(
    dims: MatrixDims | None, rows: Float[Array, "..."], columns: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    """Of every entry."""
    if dims is None or columns is None:
        return rows
    rows = jnp.expand_dims(rows, dims.columns)
    whole = jnp.mean(rows, axis=dims.rows, keepdims=True)
    return rows / jnp.maximum(whole, TINY) * jnp.expand_dims(columns, dims.rows)


def _map(function: Any, tree: Params, *rest: Params) -> Params:
    """Maps (matrix dimensions or None, dimensions of one layer, leaf, ...) over the parameters."""

    def call(path, leaf, *others):
        name = path_name(path)
        layer = tuple(range(int(is_stacked(name)), leaf.ndim))
        return function(matrix_dims(name, leaf.ndim), layer, leaf, *others)

    return jax.tree.map_with_path(call, tree, *rest)
