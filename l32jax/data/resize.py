"""Pillow's bilinear resize with antialiasing, bit for bit, straight into the encoder's tiles.

Like `Resample.c` of Pillow 13: weights in fixed point, one pass after the other, rounded to bytes
in between. Pillow works on one pixel at a time; the loops here become vector instructions, as the
innermost ones run over neighbours in memory.
"""

import inspect
import math
from collections.abc import Callable

import numba
import numpy as np
from jaxtyping import UInt8, UInt32

BITS = 32 - 8 - 2  # of a weight after the point; the sum of 255 times all of them fits into 31
HALF = np.int32(1 << (BITS - 1))
ROWS = 16  # at a time in the horizontal pass
LANES = 4 * ROWS


def _compiled(function: Callable) -> Callable:
    """Compiled when first called, for all processes that can share a cache; without the GIL."""
    plain = inspect.unwrap(function)  # tests wrap everything in checks of types
    try:
        return numba.njit(nogil=True, cache=True)(plain)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(nogil=True)(plain)


def resize_into(
    tiles: UInt8[np.ndarray, "c 3 y x"],
    pixels: UInt8[np.ndarray, "height width 4"],
    size: tuple[int, int],
    *,
    columns: int,
) -> None:
    """Resizes an image to `size`, height and width, and lays it on a grid of tiles.

    tiles: in row-major order, `columns` to a row; what the image does not cover stays as it is.
    pixels: contiguous; the fourth byte of a pixel is ignored.

    Raises:
      ValueError: the tiles do not hold it.
    """
    rows = -(-size[0] // tiles.shape[2])
    if rows * columns > len(tiles) or size[1] > columns * tiles.shape[3]:
        raise ValueError(f"{size} on {tiles.shape}")  # nothing compiled here looks at bounds
    height, width = pixels.shape[:2]
    image = pixels.view(np.uint32).reshape(height, width)
    if _vertical_first((height, width), size):
        image = _lower(image, size[0])
    image.flags.writeable = False  # or else it would be compiled for both kinds
    planes = np.empty((3, len(image), size[1]), np.uint8)
    if width == size[1]:
        _split(image, len(image), planes, 0)
    else:
        _across(image, *_weights(width, size[1]), planes)
    _down(planes, *_weights(len(image), size[0]), tiles, columns)


def _vertical_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Pillow's choice since 13, by which the roundings differ; before it never was."""
    lost_rows, lost_columns = old[0] - new[0], old[1] - new[1]
    return lost_rows > max(2 * lost_columns, 0)


def _lower(image: UInt32[np.ndarray, "h x"], height: int) -> UInt32[np.ndarray, "y x"]:
    """The vertical pass over whole pixels: their bytes are the columns of one wide tile."""
    lines = image.view(np.uint8)[None]
    lower = np.empty((1, 1, height, lines.shape[2]), np.uint8)
    _down(lines, *_weights(len(image), height), lower, 1)
    return lower.view(np.uint32)[0, 0]


@_compiled
def _weights(size: int, new: int):
    """Of each of `new` positions: the first of the old ones it sees and how many, and weights."""
    scale = np.float64(np.float32(size)) / new  # Pillow keeps sizes in single precision
    reach = max(scale, 1.0)
    spans = np.zeros((new, 2), np.int64)
    weights = np.zeros((new, 2 * math.ceil(reach) + 1), np.int32)
    values = np.empty(weights.shape[1])
    for at in range(new):
        center = (at + 0.5) * scale
        first = max(int(center - reach + 0.5), 0)
        count = min(int(center + reach + 0.5), size) - first
        total = 0.0
        for tap in range(count):
            values[tap] = max(1.0 - abs((tap + first - center + 0.5) * (1.0 / reach)), 0.0)
            total += values[tap]
        for tap in range(count):
            weights[at, tap] = int(0.5 + values[tap] / total * (1 << BITS))
        while weights[at, count - 1] == 0:
            count -= 1
        spans[at, 0] = first
        spans[at, 1] = count
    return spans, weights


@_compiled
def _across(image, spans, weights, planes):
    """The horizontal pass, [y, old x] of pixels to [colour, y, x].

    Of some rows at a time, turned: the same column of all of them is then one vector.
    """
    turned = np.empty((image.shape[1], ROWS), np.uint32)
    found = np.empty((len(spans), ROWS), np.uint32)
    lines = np.empty((ROWS, len(spans)), np.uint32)
    for top in range(0, len(image), ROWS):
        rows = min(ROWS, len(image) - top)
        _turn(image, top, rows, turned)
        _blend(turned.view(np.uint8), spans, weights, found.view(np.uint8))
        _turn(found, 0, len(found), lines)
        _split(lines, rows, planes, top)


@_compiled
def _turn(source, top, rows, target):
    """Rows of `source` from `top` on to the columns of `target`, in blocks that a cache holds."""
    width = source.shape[1]
    whole = width - width % ROWS
    for left in range(0, whole, ROWS):
        for row in range(rows):
            for x in range(ROWS):
                target[left + x, row] = source[top + row, left + x]
    for x in range(whole, width):
        for row in range(rows):
            target[x, row] = source[top + row, x]


@_compiled
def _blend(columns, spans, weights, found):
    sums = np.empty(LANES, np.int32)
    for x in range(len(spans)):
        first, count = spans[x, 0], spans[x, 1]
        for lane in range(LANES):
            sums[lane] = HALF
        for tap in range(count):
            weight = weights[x, tap]
            for lane in range(LANES):
                sums[lane] += np.int32(columns[first + tap, lane]) * weight
        for lane in range(LANES):
            found[x, lane] = min(sums[lane] >> BITS, 255)


@_compiled
def _split(pixels, rows, planes, top):
    """Pixels to planes of one colour each."""
    for row in range(rows):
        for colour in range(3):
            for x in range(pixels.shape[1]):
                planes[colour, top + row, x] = (pixels[row, x] >> (8 * colour)) & 255


@_compiled
def _down(planes, spans, weights, tiles, columns):
    """The vertical pass, [colour, old y, x] to tiles."""
    width = planes.shape[2]
    sums = np.empty(width, np.int32)
    for y in range(len(spans)):
        first, count = spans[y]
        for colour in range(len(planes)):
            for x in range(width):
                sums[x] = HALF
            for tap in range(count):
                weight = weights[y, tap]
                for x in range(width):
                    sums[x] += np.int32(planes[colour, first + tap, x]) * weight
            _lay(sums, tiles, y, colour, columns)


@_compiled
def _lay(sums, tiles, y, colour, columns):
    """One line of an image over all the tiles that it crosses."""
    height, width = tiles.shape[2:]
    for column in range(columns):
        part = sums[column * width : (column + 1) * width]
        line = tiles[y // height * columns + column, colour, y % height]
        for x in range(len(part)):
            line[x] = min(part[x] >> BITS, 255)
