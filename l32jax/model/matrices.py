"""Which weights are matrices, and what an optimizer may take for their rows and columns."""

from typing import NamedTuple

from l32jax.model.parameters import is_stacked

TABLES = ("decoder/embedding/", "decoder/head/", "decoder/image_embedding/", "decoder/reward_head/")


class MatrixDims(NamedTuple):
    """The dimensions of a weight that are rows of one matrix, and those that are its columns.

    [l n h d] is l matrices of n * h rows and d columns: what is in neither is a stack of them.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]


def is_projection(path: str) -> bool:
    """Whether a parameter multiplies activations; tables are looked up, or scored against."""
    return path.endswith("/weight") and not path.startswith(TABLES)


def matrix_dims(path: str, ndim: int) -> MatrixDims | None:
    """The matrices of a parameter, stored [outs, ins] as `model.layers.Projection` has them.

    Tables of vectors are matrices too, a row for each vector; scales, biases and gates are none.
    """
    first = int(is_stacked(path))
    if ndim - first < 2 or path.endswith("/bias"):
        return None
    # Attention's output has several dimensions of input, [d n h], and lora_a may, [r n h]; all else
    # several of output.
    last_row = first + 1 if path.endswith(("/out/weight", "/lora_a")) else ndim - 1
    return MatrixDims(tuple(range(first, last_row)), tuple(range(last_row, ndim)))
