"""Tile embeddings as Hugging Face keeps them: by aspect ratio, where ours and Meta's are one grid.

Its rows repeat most cells of the grid, and have none of the eight that are in no aspect ratio.
"""

import math
from dataclasses import replace

import numpy as np

from l32jax.checkpoint.engine.slices import ALL, Home, Shape, Slices
from l32jax.checkpoint.engine.tables import Layout
from l32jax.checkpoint.hugging_face_config import ASPECT_RATIOS
from l32jax.errors import InputError

LOST_TILES = (
    "half of the tile embeddings, those of no supported aspect ratio, are not in Hugging Face's "
    "format"
)
GRIDS = (
    "vision/position/tile_embedding",
    "vision/pre_tile/embedding",
    "vision/post_tile/embedding",
)


def _to_grid(theirs: np.ndarray, shape: Shape) -> np.ndarray:
    """The cells of our [c c *rest] that the rows of their aspect ratios hold, zeros elsewhere."""
    side = shape[0]
    rows = theirs.reshape(len(ASPECT_RATIOS) + 1, side, *shape[2:])
    grid, known = np.zeros(shape, theirs.dtype), np.zeros((side, side), bool)
    for row, (height, width) in zip(rows[1:], ASPECT_RATIOS, strict=True):
        if row[height * width :].any():
            raise InputError(
                f"its row for {height}x{width} tiles has values for tiles beyond them, where this "
                "model has none; take these tables from the released checkpoint"
            )
        for tile, cell in enumerate(row[: height * width]):
            y, x = divmod(tile, width)
            if known[y, x] and not np.array_equal(grid[y, x], cell):
                raise InputError(
                    f"its rows disagree about the tile at {(y, x)}: they were trained apart, "
                    "while this model has one embedding for each place in the grid; "
                    "take these tables from the released checkpoint"
                )
            grid[y, x], known[y, x] = cell, True
    return grid


def _from_grid(ours: np.ndarray, shape: Shape) -> np.ndarray:
    side = ours.shape[0]
    rows = np.zeros((shape[0], side, *ours.shape[2:]), ours.dtype)
    for row, (height, width) in zip(rows[1:], ASPECT_RATIOS, strict=True):
        row[: height * width] = ours[:height, :width].reshape(height * width, *ours.shape[2:])
    return rows.reshape(shape)


# Row r of theirs is the aspect ratio r - 1 of the list; row 0 is of images that are absent.
GRID = Layout(
    lambda shape: (len(ASPECT_RATIOS) + 1, math.prod(shape[1:])),
    _to_grid,
    _from_grid,
    by_rows=False,
)


def kept(slices: Slices) -> Slices:
    """What is left of a model that was in this format: without the tiles of no aspect ratio."""

    def read(home: Home, rows: slice) -> np.ndarray:
        values = np.asarray(slices.read(home, ALL if home.path in GRIDS else rows))
        if home.path not in GRIDS:
            return values
        return _to_grid(_from_grid(values, GRID.their_shape(values.shape)), values.shape)[rows]

    return replace(slices, read=read)
