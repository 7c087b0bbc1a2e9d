"""Features of the images of one source, on a disk: listed, then written unit by unit.

    part-<digest>/
      images.npy            which images they are, and the grid of tiles of each
      part.json             written when that is done: the digest of images.npy
      tiles/                zarr3 [image, tile, p, e]: a file for each UNIT images, which has the
                            tiles that are used alone, each with its CRC-32C
      units/00000000.json   written when a unit is done: which images other parts had by then, and
                            which could not be decoded, and why

A unit without its file below `units` is computed again: that is the file to remove where tiles are
damaged. Who computes together sees one folder, and no two write the same unit.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts
from jaxtyping import Int, Shaped

from l32jax.errors import InputError, one_line

UNIT = 16  # images that a kill costs; of 11B at 448 pixels 1 GB, which memory holds a few times
IMAGE = np.dtype(
    [("key", "S32"), ("rows", "u1"), ("columns", "u1"), ("record", "<u8"), ("number", "<u4")]
)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_JSON_BYTES = 16 << 20
# How tensorstore begins to tell of trouble on the way to a file; all else is of what it holds.
TROUBLE = ("PERMISSION_DENIED", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What features depend on beside the image, and their shape.

    encoder: digest of its parameters and architecture.
    image_size, max_tiles: pixels along a tile, and how many an image is cut into at most.
    tokens, width: of a tile.
    """

    encoder: str
    image_size: int
    max_tiles: int
    tokens: int
    width: int
    dtype: Literal["float32", "bfloat16"]

    @property
    def tile_bytes(self) -> int:
        return self.tokens * self.width * DTYPES[self.dtype].itemsize


class Unit(NamedTuple):
    """Features of the used tiles of up to UNIT images, and which tile of which image each is.

    Images are counted in the unit.

    elsewhere: images whose features another part has.
    bad: why images could not be decoded.
    """

    image: Int[np.ndarray, "m"]
    tile: Int[np.ndarray, "m"]
    features: Shaped[np.ndarray, "m p e"]
    elsewhere: Sequence[int]
    bad: Mapping[int, str]


class Contents(NamedTuple):
    """The images that units are done of, but not those that are elsewhere; why some are bad."""

    images: Int[np.ndarray, "n"]
    bad: dict[int, str]


class Part:
    """Images by number, of which there are features unit by unit.

    images: an array of IMAGE, whose `record` and `number` say where in the source each is.
    """

    def __init__(self, folder: Path, kind: Kind):
        self.folder, self._kind = folder, kind
        listed = folder / "images.npy"
        try:
            is_whole = read_json(folder / "part.json").get("images") == _digest_of(listed)
        except (OSError, InputError):
            is_whole = False
        if not is_whole:
            raise InputError(f"features in {str(folder)!r}: damaged; remove this folder of them")
        self.images = np.load(listed, allow_pickle=False)

    @staticmethod
    def begin(folder: Path, images: np.ndarray) -> None:
        """Lists the images of a new part."""
        (folder / "units").mkdir(parents=True, exist_ok=True)
        with (folder / "images.npy").open("wb") as file:
            np.save(file, images, allow_pickle=False)
            _sync(file)
        write_json(folder / "part.json", {"images": _digest_of(folder / "images.npy")})

    @staticmethod
    def is_begun(folder: Path) -> bool:
        return (folder / "part.json").exists()

    @property
    def num_units(self) -> int:
        return -(-len(self.images) // UNIT)

    @functools.cached_property
    def done(self) -> np.ndarray:
        """Of each unit, whether it was done when this was first asked."""
        names = set(os.listdir(self.folder / "units"))
        return np.array([self._mark(n).name in names for n in range(self.num_units)], bool)

    def unit(self, number: int) -> np.ndarray:
        """Its images."""
        return self.images[number * UNIT : (number + 1) * UNIT]

    def write(self, number: int, unit: Unit) -> None:
        """A whole unit. OSError if that cannot be done."""
        # Of one that was cut off or is damaged, nothing is worth reading.
        (self.folder / "tiles" / f"c.{number}.0.0.0").unlink(missing_ok=True)
        try:
            if len(unit.features):
                with ts.Transaction() as at_once:
                    tiles = self._tiles.with_transaction(at_once)
                    places = number * UNIT + unit.image, unit.tile
                    tiles.vindex[places].write(unit.features).result()
        except ValueError as error:
            raise OSError(f"{self.folder}: {one_line(error)}") from None
        write_json(self._mark(number), {"elsewhere": unit.elsewhere, "bad": list(unit.bad.items())})

    @functools.cached_property
    def contents(self) -> Contents:
        """Of the units that were done when this was first asked."""
        here, bad = np.repeat(self.done, UNIT)[: len(self.images)], {}
        for unit in np.flatnonzero(self.done).tolist():
            mark, first = self._mark(unit), unit * UNIT
            try:
                told = read_json(mark)
                here[[first + int(image) for image in told["elsewhere"]]] = False
                bad |= {first + int(image): str(why) for image, why in told["bad"]}
            except (KeyError, TypeError, ValueError, IndexError):
                raise InputError(f"file {str(mark)!r}: damaged; remove it, start again") from None
        return Contents(np.flatnonzero(here), bad)

    def read(self, image: int, num_tiles: int) -> ts.Future:
        """A future of the features of its used tiles, [tile p e]."""
        return self._tiles[image, :num_tiles].read()

    def unreadable(self, image: int, error: ValueError) -> Exception:
        """What is to be said of an image whose future failed."""
        if str(error).startswith(TROUBLE):
            return OSError(f"features in {self.folder}: they cannot be read ({one_line(error)})")
        unit = image // UNIT
        return InputError(
            f"features of image {image} in {str(self.folder / 'tiles' / f'c.{unit}.0.0.0')!r}: "
            f"damaged or missing; remove {str(self._mark(unit))!r} and start again"
        )

    @functools.cached_property
    def _tiles(self) -> ts.TensorStore:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self.folder.absolute() / 'tiles'}/"},
            "metadata": _metadata(self._kind, self.num_units),
            # A used tile is there whatever it holds: if it is missing that is an error, not zeros.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        try:
            return ts.open(spec, open=True, create=True, context=context).result()
        except ValueError as error:
            raise InputError(
                f"features in {str(self.folder / 'tiles')!r}: {one_line(error)}; check the folder, "
                f"or remove {str(self.folder)!r} and start again"
            ) from None

    def _mark(self, unit: int) -> Path:
        return self.folder / "units" / f"{unit:08}.json"


def _metadata(kind: Kind, num_units: int) -> dict[str, Any]:
    tile = (kind.tokens, kind.width)
    coded = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [1, 1, *tile], "codecs": coded, "index_codecs": coded}
    unit = [UNIT, kind.max_tiles, *tile]
    return {
        "shape": [num_units * UNIT, *unit[1:]],
        "data_type": kind.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": unit}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0.0,
    }


def read_json(path: Path) -> dict[str, Any]:
    """InputError for what is no object; OSError if it cannot be read."""
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"file {str(path)!r}: damaged; remove it and start again")
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing, on the disk when this returns."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(json.dumps(content).encode() + b"\n")
        _sync(file)
    unfinished.replace(path)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
