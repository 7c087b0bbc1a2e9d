"""Images as the tiles that the encoder reads, bit for bit as llama-models' `image_transform.py`."""

import io
import json
import math
import os
import pathlib

import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image

from l32jax.config import CLIP_MEAN, CLIP_STD, VisionConfig
from l32jax.errors import InputError

# Encoded files and pictures stay as they are until a row is made of them.
ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray
Grid = tuple[int, int]  # (rows, columns) of tiles

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB of RGB
MAX_BYTES = 128 << 20
# Decoders that only decode: EPS, for one, would start an interpreter.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

RESAMPLE = Image.Resampling.BILINEAR

# (rows, columns) in the order of Hugging Face's ids, which begin at 1; its documentation has the
# two swapped.
ASPECT_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def aspect_ratio_id(grid: Grid) -> int:
    """Hugging Face's number of a grid of tiles; 0 stands for no image, (0, 0)."""
    if grid == (0, 0):
        return 0
    if grid not in ASPECT_RATIOS:
        raise InputError(f"{grid} is no grid of tiles: known are {ASPECT_RATIOS}")
    return ASPECT_RATIOS.index(grid) + 1


def load_image(source: ImageSource) -> Image.Image:
    """Decodes a file, bytes, picture or uint8 array [y x 3] to RGB; nobody vouches for it.

    As in Meta's code transparency is dropped and an EXIF orientation not applied; of an animation
    it is the first frame. Anything that is not an image within MAX_BYTES and MAX_PIXELS is an
    InputError that names the file.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "the given picture")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    where, data = _read(source)
    return _rgb(_open(data, where), where)


def preprocess(
    source: ImageSource,
    *,
    tile_size: int,
    max_tiles: int = 4,
    out: UInt8[np.ndarray, "_ 3 y x"] | None = None,
) -> tuple[UInt8[np.ndarray, "c 3 y x"], Grid]:
    """The tiles of an image in row-major order, and the grid they form.

    The image, decoded as `load_image` does it and with the same errors, is resized to the best of
    the canvases of up to `max_tiles` tiles, keeping its shape; the rest of the canvas, right and
    below, is black. `normalise` makes floats of the tiles.

    out: zeros whose first tiles are written and returned, instead of new memory.
    """
    from l32jax.data.resize import resize_into  # its compiler takes 0.7 s to import

    pixels = _load_pixels(source)
    height, width = pixels.shape[:2]
    grid = choose_grid(height, width, tile_size=tile_size, max_tiles=max_tiles)
    size = fit(height, width, grid, tile_size=tile_size)
    if out is None:
        out = np.zeros((math.prod(grid), 3, tile_size, tile_size), np.uint8)
    tiles = out[: math.prod(grid)]
    resize_into(tiles, pixels, size, columns=grid[1])
    return tiles, grid


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGB image of another height and width, resized as `preprocess` does it."""
    from l32jax.data.resize import resize_into

    planes = np.empty((1, 3, *size), np.uint8)
    resize_into(planes, _pixels(image), size, columns=1)
    return Image.fromarray(np.ascontiguousarray(planes[0].transpose(1, 2, 0)))


def normalise(tiles: UInt8[np.ndarray, "c 3 y x"]) -> Float32[np.ndarray, "c 3 y x"]:
    """What the encoder takes, as the reference computes it; the model does it on its devices."""
    values = tiles.astype(np.float32)
    for plane, mean, std in zip(values.swapaxes(0, 1), CLIP_MEAN, CLIP_STD, strict=True):
        plane /= 255
        plane -= np.float32(mean)
        plane /= np.float32(std)
    return values


def choose_grid(height: int, width: int, *, tile_size: int, max_tiles: int) -> Grid:
    """The grid that enlarges an image least, or else the one that shrinks it least."""

    def scale(grid: Grid) -> float:
        return min(grid[0] * tile_size / height, grid[1] * tile_size / width)

    sides = range(1, max_tiles + 1)
    grids = [(rows, cols) for rows in sides for cols in sides if rows * cols <= max_tiles]
    enlarging = [grid for grid in grids if scale(grid) >= 1]
    best = min(map(scale, enlarging)) if enlarging else max(map(scale, grids))
    return min((grid for grid in grids if scale(grid) == best), key=math.prod)


def fit(height: int, width: int, grid: Grid, *, tile_size: int) -> tuple[int, int]:
    """Height and width to resize to: inside the canvas, enlarging up to one tile at most."""
    max_height = min(max(height, tile_size), grid[0] * tile_size)
    max_width = min(max(width, tile_size), grid[1] * tile_size)
    by_height, by_width = max_height / height, max_width / width
    # A strip may be thinner than a pixel: one pixel then, as in Hugging Face; Meta's code fails.
    if by_width < by_height:
        return max(min(math.floor(height * by_width), max_height), 1), max_width
    return max_height, max(min(math.floor(width * by_height), max_width), 1)


def mirrored_at_random(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """For data whose answers do not depend on left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else image


def _load_pixels(source: ImageSource) -> UInt8[np.ndarray, "y x 4"]:
    """The pixels of `load_image`; most JPEG files never become a picture of Pillow's."""
    if isinstance(source, Image.Image | np.ndarray):
        return _pixels(load_image(source))
    where, data = _read(source)
    image = _open(data, where)
    _require_size(image, where)
    found = _jpeg_pixels(data, image)
    return _pixels(_rgb(image, where)) if found is None else found


def _jpeg_pixels(data: bytes, image: Image.Image) -> UInt8[np.ndarray, "y x 4"] | None:
    """By the decoder that Pillow has too, without the copies; None is for Pillow to judge."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return None
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (image.height, image.width):
            return None  # of two headers Pillow's is the one whose size was checked
        return simplejpeg.decode_jpeg(data, "RGBX")
    except Exception:  # noqa: BLE001  (any damage, also what Pillow puts up with)
        return None


def _pixels(image: Image.Image) -> UInt8[np.ndarray, "y x 4"]:
    """Of an RGB image, as Pillow keeps them: the fourth byte says nothing."""
    data = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)
    return data.reshape(image.height, image.width, 4)


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise InputError(
            f"image array {pixels.dtype}{list(pixels.shape)}: expected uint8 [height, width, 3]"
        )
    return Image.fromarray(pixels)


def _read(source: str | os.PathLike | bytes) -> tuple[str, bytes]:
    if isinstance(source, bytes):
        where, data = f"{len(source)} bytes", source
    else:
        path = pathlib.Path(source)
        where, data = repr(str(path)), _read_file(path)
    if len(data) > MAX_BYTES:
        raise InputError(f"image in {where}: more than {MAX_BYTES} bytes; make the file smaller")
    return where, data


def _read_file(path: pathlib.Path) -> bytes:
    try:
        if not path.is_file():  # nor a pipe or device, which might never end
            why = "not a file" if path.exists() else "no such file"
            raise InputError(f"image in {str(path)!r}: {why}; check the path")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"image in {str(path)!r}: {error}; check the path") from None


def _open(data: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise InputError(f"image in {where}: not one of {known}; convert it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(where) from None
    except Exception as error:  # noqa: BLE001  (decoders of broken files raise almost anything)
        raise _broken(where, error) from None


def _rgb(image: Image.Image, where: str) -> Image.Image:
    _require_size(image, where)
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # noqa: BLE001
        raise _broken(where, error) from None


def _require_size(image: Image.Image, where: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(where)
    if image.width * image.height == 0:
        raise InputError(f"image in {where}: it has no pixels; give another")


def _too_large(where: str) -> InputError:
    return InputError(f"image in {where}: more than {MAX_PIXELS} pixels; make it smaller")


def _broken(where: str, error: Exception) -> InputError:
    why = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"image in {where}: damaged ({why}); replace the file")


def preprocessor_json(vision: VisionConfig) -> bytes:
    """The content of preprocessor_config.json: what is done here, as transformers is told it."""
    size = vision.image_size
    content = {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": int(RESAMPLE),
        "do_pad": True,
        "max_image_tiles": vision.max_tiles,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    return (json.dumps(content, indent=2) + "\n").encode()
