import io
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from l32jax.data import images
from l32jax.data.images import (
    ASPECT_RATIOS,
    aspect_ratio_id,
    choose_grid,
    fit,
    load_image,
    mirrored_at_random,
    normalise,
    preprocess,
)
from l32jax.errors import InputError

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "data" / "image_tiles56_meta.npz")

# (width, height) -> grid (rows, columns), size after resizing (width, height)
CANVASES_560 = [
    ((100, 100), (1, 1), (560, 560)),
    ((300, 200), (1, 1), (560, 373)),
    ((561, 560), (1, 2), (561, 560)),
    ((800, 600), (2, 2), (800, 600)),
    ((1920, 1080), (2, 2), (1120, 630)),
    ((640, 2000), (4, 1), (560, 1750)),
    ((3000, 500), (1, 4), (2240, 373)),
    ((5, 900), (2, 1), (5, 900)),
    ((4000, 3000), (2, 2), (1120, 840)),
]
CANVASES_448 = [
    ((560, 560), (2, 2), (560, 560)),
    ((1024, 768), (2, 2), (896, 672)),
    ((1920, 1080), (2, 2), (896, 504)),
    ((640, 2000), (4, 1), (448, 1400)),
    ((5, 900), (3, 1), (5, 900)),
]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


@pytest.mark.parametrize("index", range(10))
def test_tiles_equal_metas_bit_for_bit(index):
    image = load_image(GOLDEN[f"img{index}"])
    tiles, grid = preprocess(image, tile_size=56)
    assert grid == tuple(GOLDEN[f"ar{index}"])
    assert np.array_equal(normalise(tiles), GOLDEN[f"tiles{index}"])


@pytest.mark.parametrize(
    ("tile_size", "size", "grid", "resized"),
    [(560, *case) for case in CANVASES_560] + [(448, *case) for case in CANVASES_448],
)
def test_canvas_is_the_published_one(tile_size, size, grid, resized):
    width, height = size
    assert choose_grid(height, width, tile_size=tile_size, max_tiles=4) == grid
    assert fit(height, width, grid, tile_size=tile_size) == resized[::-1]


SIDES = st.integers(1, 5000)


@given(SIDES, SIDES, st.sampled_from([28, 448, 560]), st.integers(1, 6))
def test_every_image_fits_the_canvas_chosen_for_it(height, width, tile_size, max_tiles):
    grid = choose_grid(height, width, tile_size=tile_size, max_tiles=max_tiles)
    resized = fit(height, width, grid, tile_size=tile_size)
    assert 1 <= math.prod(grid) <= max_tiles
    for side, tiles in zip(resized, grid, strict=True):
        assert 1 <= side <= tiles * tile_size


@given(SIDES, SIDES)
def test_turning_an_image_turns_its_grid(height, width):
    grid = choose_grid(height, width, tile_size=448, max_tiles=4)
    assert choose_grid(width, height, tile_size=448, max_tiles=4) == grid[::-1]


def test_a_square_may_lose_a_column_to_rounding_as_in_metas_code():
    assert fit(55, 55, (1, 1), tile_size=448) == (448, 447)  # floor(55 * (448 / 55))


@given(SIDES, SIDES)
def test_only_images_below_a_tile_are_enlarged(height, width):
    grid = choose_grid(height, width, tile_size=448, max_tiles=4)
    new_height, new_width = fit(height, width, grid, tile_size=448)
    if max(height, width) >= 448:
        assert new_height <= height and new_width <= width


def test_a_thread_of_an_image_keeps_one_pixel():
    tiles, grid = preprocess(Image.new("RGB", (1, 9000), "white"), tile_size=28)
    assert grid == (4, 1)
    assert (tiles[:, 0] > 0).sum() == 4 * 28  # one column of white


def test_one_tile_is_the_whole_image_when_only_one_is_allowed():
    tiles, grid = preprocess(Image.new("RGB", (90, 60), "white"), tile_size=30, max_tiles=1)
    assert grid == (1, 1) and tiles.shape == (1, 3, 30, 30)
    assert (tiles[0, 0] > 0).sum() == 30 * 20


def test_padding_is_black_before_normalisation():
    tiles, _ = preprocess(Image.new("RGB", (28, 14), "white"), tile_size=28)
    assert not tiles[0, :, -1, -1].any()
    black = normalise(tiles)[0, :, -1, -1]
    assert black == pytest.approx([-1.7923, -1.7521, -1.4802], abs=1e-4)


def test_tiles_are_written_into_the_memory_given(noise):
    memory = np.zeros((4, 3, 28, 28), np.uint8)
    tiles, grid = preprocess(noise, tile_size=28, out=memory)
    assert grid == (2, 2) and np.shares_memory(tiles, memory)
    assert np.array_equal(memory, preprocess(noise, tile_size=28)[0])


def test_aspect_ratio_ids_count_grids_in_hugging_faces_order():
    ids = {grid: aspect_ratio_id(grid) for grid in ((0, 0), *ASPECT_RATIOS)}
    assert list(ids.values()) == list(range(9))
    assert (ids[1, 2], ids[2, 1]) == (2, 5)
    with pytest.raises(InputError, match=r"\(3, 3\) is no grid"):
        aspect_ratio_id((3, 3))


def test_paths_bytes_pictures_and_arrays_are_the_same_image(noise, tmp_path):
    path = tmp_path / "noise.png"
    noise.save(path)
    forms = (path, str(path), path.read_bytes(), noise, np.asarray(noise))
    for form in forms:
        image = load_image(form)
        assert image.mode == "RGB"
        assert np.array_equal(image, noise)


def test_transparency_is_dropped_as_in_metas_code():
    image = load_image(encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0))))
    assert image.getpixel((0, 0)) == (10, 20, 30)


def test_orientation_tags_are_not_applied_as_in_metas_code(noise):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert load_image(encoded(noise, "JPEG", exif=exif)).size == noise.size


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    assert load_image(encoded(Image.new(mode, (5, 4)), "TIFF")).mode == "RGB"


def test_what_is_no_image_file_is_named_in_one_line(tmp_path):
    text = tmp_path / "a\nb.png"
    text.write_text("<svg/>")
    for source, why in [
        (text, "not one of"),
        (tmp_path / "missing.png", "no such file"),
        (tmp_path, "not a file"),
        ("a\0b", "image in"),
        (b"", "not one of"),
    ]:
        with pytest.raises(InputError, match=why) as caught:
            load_image(source)
        assert "\n" not in str(caught.value)
        assert isinstance(source, bytes) or repr(str(source)) in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_an_input_error(kind, noise):
    data = encoded(noise, kind)
    with pytest.raises(InputError, match="damaged|not one of"):
        load_image(data[: len(data) // 2])


@given(st.data())
def test_a_damaged_file_is_an_image_or_an_input_error(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))
    damaged = bytearray(encoded(Image.linear_gradient("L").resize((16, 16)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert load_image(bytes(damaged)).mode == "RGB"
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 12_000, 20_000])  # silent, a warning, an error in Pillow
def test_decompression_bombs_are_refused_before_decoding(side):
    header = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    header[18:26] = np.array([side, side], "<i4").tobytes()
    with pytest.raises(InputError, match="pixels"):
        load_image(bytes(header))


def test_oversized_files_are_refused(monkeypatch, noise, tmp_path):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    noise.save(tmp_path / "noise.png")
    for source in (tmp_path / "noise.png", (tmp_path / "noise.png").read_bytes()):
        with pytest.raises(InputError, match="more than 100 bytes"):
            load_image(source)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_arrays_of_another_kind_are_refused(array):
    with pytest.raises(InputError, match="expected uint8"):
        load_image(array)


def test_mirroring_swaps_left_and_right_half_of_the_time(noise):
    rng = np.random.default_rng(0)
    found = {mirrored_at_random(noise, rng).tobytes() for _ in range(20)}
    assert found == {noise.tobytes(), noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()}
