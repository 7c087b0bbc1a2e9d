"""Foreign checkpoints by the names of their tensors, before anything is known of the model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from l32jax.checkpoint.engine.slices import Shape, nothing


class Tensor(NamedTuple):
    """What is known of a tensor unread. Its rows are read in multiples of `step`."""

    shape: Shape
    dtype: np.dtype
    step: int = 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """Foreign tensors by name: shapes and dtypes at once, rows of the first dim when asked for.

    `dtype` is the one that `read` gives, for quantised tensors that of the dequantised values.
    """

    where: str
    tensors: Mapping[str, Tensor]
    read: Callable[[str, slice], np.ndarray]
    release: Callable[[], None] = nothing

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, np.ndarray],
        where: str,
        release: Callable[[], None] = nothing,
    ) -> "Source":
        tensors = {name: Tensor(array.shape, array.dtype) for name, array in arrays.items()}
        return cls(where, tensors, lambda name, rows: arrays[name][rows], release)
