"""Images of records: decoded once to see whether that works, and shrunk to what a model can use."""

import io
from pathlib import Path

from PIL import Image as Pillow

from l32jax.data.images import choose_grid, fit, load_image, resized
from l32jax.data.prepare.config import ImageRules
from l32jax.data.prepare.content import Removed, with_images
from l32jax.data.records import Record, image_size

JPEG_QUALITY = 95
LOSSY = (b"\xff\xd8\xff", b"RIFF")  # JPEG, WebP


def usable_images(
    record: Record, rules: ImageRules | None, *, tile_size: int, max_tiles: int
) -> Record | Removed:
    """The record with its images as bytes, none larger than the canvas that shows it best.

    What is larger becomes JPEG if it was JPEG or WebP, else PNG, whose tiles are then those of the
    original bit for bit.

    Raises:
      InputError: an image that cannot be decoded.
    """
    images: list[bytes] = []
    for source in record.images:
        image_size(source)  # which bounds what is read
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        picture = load_image(data)
        if rules is not None and not _is_allowed(picture, rules):
            return Removed("image shape")
        images.append(_shrunk(data, picture, tile_size, max_tiles))
    return with_images(record, images)


def _is_allowed(picture: Pillow.Image, rules: ImageRules) -> bool:
    short, long = sorted(picture.size)
    return short >= rules.min_side and long <= rules.max_aspect * short


def _shrunk(data: bytes, picture: Pillow.Image, tile_size: int, max_tiles: int) -> bytes:
    size = (picture.height, picture.width)
    grid = choose_grid(*size, tile_size=tile_size, max_tiles=max_tiles)
    height, width = fit(*size, grid, tile_size=tile_size)
    if height >= picture.height and width >= picture.width:
        return data
    file = io.BytesIO()
    smaller = resized(picture, (height, width))
    if data.startswith(LOSSY):
        smaller.save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        smaller.save(file, "PNG")
    return file.getvalue()
