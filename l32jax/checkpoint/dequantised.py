"""Weights that training keeps quantised (`model.quantise`) as the numbers that they stand for.

They are two arrays, X/weight/qvalue and X/weight/scale, which has as many dimensions: an entry for
each of the first, and for each group of the others.
"""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from l32jax.checkpoint.engine.slices import Home, Slices
from l32jax.errors import InputError
from l32jax.model.parameters import is_stacked

VALUES, SCALES = "/qvalue", "/scale"
INTEGERS = (np.dtype(np.int8), np.dtype(ml_dtypes.int4))


def dequantised(slices: Slices) -> Slices:
    """All as floats: what was quantised is float32, and exact.

    InputError if the shapes of one do not go together.
    """
    weights = [path.removesuffix(VALUES) for path in slices.shapes if path.endswith(VALUES)]
    if not weights:
        return slices
    pairs = {weight: (weight + VALUES, weight + SCALES) for weight in weights}
    for values, scales in pairs.values():
        _require_fit(slices, values, scales)
    parts = {part: weight for weight, pair in pairs.items() for part in pair}
    shapes = {parts.get(path, path): shape for path, shape in slices.shapes.items()}
    shapes |= {weight: slices.shapes[values] for weight, (values, _) in pairs.items()}
    dtypes = {path: slices.dtypes.get(path, np.dtype(np.float32)) for path in shapes}

    def read(home: Home, rows: slice) -> Any:
        if home.path not in pairs:
            return slices.read(home, rows)
        values, scales = (
            np.asarray(slices.read(Home(path, home.layer), rows)).astype(np.float32)
            for path in pairs[home.path]
        )
        for dim in range(1, values.ndim):
            scales = np.repeat(scales, values.shape[dim] // scales.shape[dim], axis=dim)
        return values * scales

    return replace(slices, shapes=shapes, dtypes=dtypes, read=read)


def _require_fit(slices: Slices, values: str, scales: str) -> None:
    """`read` takes rows of both."""
    shape, groups = slices.shapes[values], slices.shapes.get(scales, ())
    first = 1 + is_stacked(values)
    fits = len(shape) == len(groups) > first and shape[:first] == groups[:first]
    if not fits or any(n < 1 or size % n for size, n in zip(shape, groups, strict=True)):
        raise InputError(
            f"array {scales!r:.200} in {slices.where}: its shape is {list(groups)}, which does not "
            f"go with {list(shape)} of what it scales; copy the checkpoint again"
        )
