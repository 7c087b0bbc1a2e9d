"""Tiles are Pillow's pixels, whichever way they come. Its order of passes is that of Pillow 13."""

import io
import math

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from l32jax.data import resize
from l32jax.data.images import ASPECT_RATIOS, choose_grid, fit, load_image, preprocess, resized
from l32jax.errors import InputError


def by_pillow(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def on_a_canvas(image: Image.Image, tile: int, max_tiles: int) -> np.ndarray:
    grid = choose_grid(image.height, image.width, tile_size=tile, max_tiles=max_tiles)
    size = fit(image.height, image.width, grid, tile_size=tile)
    canvas = np.zeros((grid[0] * tile, grid[1] * tile, 3), np.uint8)
    canvas[: size[0], : size[1]] = by_pillow(image, size)
    cut = canvas.reshape(grid[0], tile, grid[1], tile, 3).transpose(0, 2, 4, 1, 3)
    return cut.reshape(math.prod(grid), 3, tile, tile)


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Noise; every other one of few values, among them the largest, that would overflow."""
    rng = np.random.default_rng(seed)
    values = np.array([0, 1, 254, 255]) if seed % 2 else np.arange(256)
    return Image.fromarray(rng.choice(values, (height, width, 3)).astype(np.uint8))


SIDES = st.integers(1, 600)


@given(SIDES, SIDES, st.sampled_from([28, 56, 224]), st.integers(1, 4), st.integers(0, 99))
def test_tiles_are_pillows_pixels(height, width, tile, max_tiles, seed):
    image = picture(seed, height, width)
    tiles, _ = preprocess(image, tile_size=tile, max_tiles=max_tiles)
    np.testing.assert_array_equal(tiles, on_a_canvas(image, tile, max_tiles))


@pytest.mark.parametrize("grid", ASPECT_RATIOS)
@pytest.mark.parametrize("scale", [0.97, 1, 6.3])
def test_tiles_of_every_grid_are_pillows_pixels(grid, scale):
    image = picture(1, *(round(28 * side * scale) for side in grid))
    tiles, found = preprocess(image, tile_size=28)
    assert found == grid or scale > 1  # four tiles shrink a large one least
    np.testing.assert_array_equal(tiles, on_a_canvas(image, 28, 4))


@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 99))
def test_any_change_of_shape_is_pillows(height, width, new_height, new_width, seed):
    image, size = picture(seed, height, width), (new_height, new_width)
    np.testing.assert_array_equal(resized(image, size), by_pillow(image, size))


@pytest.mark.parametrize(("height", "width"), [(30_000, 1), (1, 30_000), (9_000, 7)])
def test_sums_of_thousands_of_weights_stay_in_range(height, width):
    image = Image.new("RGB", (width, height), "white")
    tiles, _ = preprocess(image, tile_size=28)
    np.testing.assert_array_equal(tiles, on_a_canvas(image, 28, 4))


def test_without_a_place_for_the_cache_it_compiles_all_the_same(monkeypatch):
    njit = numba.njit

    def no_place(cache: bool = False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", no_place)
    assert resize._compiled(lambda number: number + 1)(2) == 3


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(("height", "width"), [(64, 48), (37, 61), (1, 9)])
@pytest.mark.parametrize(
    "options",
    [
        *({"subsampling": subsampling} for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")),
        {"progressive": True, "quality": 95},
        {"keep_rgb": True},
        {"restart_marker_blocks": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_have_pillows_pixels(mode, options, height, width):
    noise = picture(4, height // 4 + 1, width // 4 + 1).resize((width, height)).convert(mode)
    data = jpeg(noise, **(options if mode == "RGB" else {**options, "keep_rgb": False}))
    direct, _ = preprocess(data, tile_size=28)
    np.testing.assert_array_equal(direct, on_a_canvas(load_image(data), 28, 4))


def outcome(source: bytes, *, by_pillow: bool) -> np.ndarray | str:
    try:
        return preprocess(load_image(source) if by_pillow else source, tile_size=28)[0]
    except InputError as error:
        return str(error)


@given(st.data())
def test_of_damaged_jpeg_files_pillow_is_the_judge(data):
    options = data.draw(st.sampled_from([{}, {"progressive": True}, {"subsampling": 0}]))
    damaged = bytearray(jpeg(picture(6, 24, 17), **options))
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    source = bytes(damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))])
    found, expected = outcome(source, by_pillow=False), outcome(source, by_pillow=True)
    np.testing.assert_array_equal(found, expected)


def test_bombs_among_jpeg_files_are_refused_before_decoding():
    data = bytearray(jpeg(Image.new("L", (8, 8))))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = np.array([60_000, 60_000], ">u2").tobytes()
    with pytest.raises(InputError, match="pixels"):
        preprocess(bytes(data), tile_size=28)


@pytest.mark.parametrize("size", [(17, 8), (8, 9)])
def test_tiles_that_do_not_hold_the_image_are_refused(size):
    tiles, pixels = np.zeros((2, 3, 8, 8), np.uint8), np.zeros((20, 20, 4), np.uint8)
    with pytest.raises(ValueError, match="on "):
        resize.resize_into(tiles, pixels, size, columns=1)
