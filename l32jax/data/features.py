"""Features that a frozen encoder computed once for the images of sources, read where rows are made.

A folder has features.json, which says of which encoder they are and of what shape, and a part for
each source (`feature_parts`). Images are told apart by what they hold: the names of files, their
order and their source do not matter, and what one part has is not computed for another.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped
from PIL import Image

from l32jax.data.feature_parts import DTYPES, IMAGE, Kind, Part, read_json, write_json
from l32jax.data.images import Grid, ImageSource, choose_grid, load_image
from l32jax.data.records import Bad, image_size
from l32jax.data.samples import Sample
from l32jax.errors import InputError, one_line

FORMAT = "l32jax image features 1"
ABOUT = "features.json"
THREADS = 8
LISTED_AT_ONCE = 256  # records
WITNESSES = 16  # records whose images are looked at to know a source again


class Stored(NamedTuple):
    """Where the features of an image are; its tiles are the first ones of the part's."""

    part: Part
    image: int
    grid: Grid


class Features:
    """The features of a folder, looked up and read by any process that is asked to.

    Units that are done after the first look are not seen.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)

    def __reduce__(self):
        return Features, (self._folder,)

    @functools.cached_property
    def kind(self) -> Kind:
        return _kind_of(self._folder)

    def has(self, keys: Shaped[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        """Whether there is an image of each key, in the dtype of IMAGE."""
        return np.isin(keys, self._index.keys)

    def find(self, image: ImageSource) -> Stored:
        """InputError if there are none, or the image could not be decoded."""
        found = self._find(image_key(image))
        if found is None:
            raise InputError(
                f"features in {str(self._folder)!r}: none of this image, which its source did not "
                "have then; remove the part-... of the source and start again"
            )
        if why := found.part.contents.bad.get(found.image):
            raise InputError(why)
        return found

    def read(self, images: Iterable[Stored], slots: int) -> Shaped[np.ndarray, "m p e"]:
        """Used tiles of one image after the other, then zeros; InputError if one is damaged."""
        kind = self.kind
        out = np.zeros((slots, kind.tokens, kind.width), DTYPES[kind.dtype])
        reading = [
            (each, each.part.read(each.image, each.grid[0] * each.grid[1])) for each in images
        ]
        begin = 0
        for (part, image, _), future in reading:
            try:
                tiles = future.result()
            except ValueError as error:
                raise part.unreadable(image, error) from None
            out[begin : begin + len(tiles)] = tiles
            begin += len(tiles)
        return out

    def _find(self, key: bytes) -> Stored | None:
        index = self._index
        place = int(np.searchsorted(index.keys, np.array(key, index.keys.dtype)))
        if place == len(index.keys) or index.keys[place] != key.rstrip(b"\0"):
            return None
        part, image = index.parts[index.part[place]], int(index.image[place])
        return Stored(part, image, part.images[["rows", "columns"]][image].item())

    @functools.cached_property
    def _index(self) -> "_Index":
        kind = self.kind
        folders = sorted(filter(Part.is_begun, self._folder.glob("part-*")))
        parts = [Part(folder, kind) for folder in folders]
        here = [part.contents.images for part in parts]
        keys = [part.images["key"][images] for part, images in zip(parts, here, strict=True)]
        keys = np.concatenate([*keys, np.zeros(0, IMAGE["key"])])
        order = np.argsort(keys)
        part = np.repeat(np.arange(len(parts)), list(map(len, here)))
        image = np.concatenate([*here, np.zeros(0, np.intp)])
        return _Index(parts, keys[order], part[order], image[order])


class _Index(NamedTuple):
    """Keys in order, and the part and the number there of the image of each."""

    parts: list[Part]
    keys: np.ndarray
    part: np.ndarray
    image: np.ndarray


def require_kind(folder: Path, kind: Kind) -> None:
    """InputError if the folder has features of another kind."""
    if not (folder / ABOUT).exists():
        return
    found, wanted = dataclasses.asdict(_kind_of(folder)), dataclasses.asdict(kind)
    other = [
        f"{name}={str(found[name])[:12]} instead of {str(value)[:12]}"
        for name, value in wanted.items()
        if found[name] != value
    ]
    if other:
        raise InputError(
            f"features in {str(folder)!r}: they are of {', '.join(other)}; name another folder"
        )


def write_kind(folder: Path, kind: Kind) -> None:
    """Makes a folder one of this kind, unless it is."""
    require_kind(folder, kind)
    if not (folder / ABOUT).exists():
        write_json(folder / ABOUT, {"format": FORMAT, "kind": dataclasses.asdict(kind)})


def _kind_of(folder: Path) -> Kind:
    try:
        found = read_json(folder / ABOUT)
    except FileNotFoundError:
        raise InputError(
            f"features in {str(folder)!r}: there are none; a stage that names it makes them"
        ) from None
    try:
        kind = Kind(**found["kind"])
        known = found["format"] == FORMAT and kind.dtype in DTYPES
    except (KeyError, TypeError):
        known = False
    if not known:
        raise InputError(
            f"file {str(folder / ABOUT)!r}: not one of this version; name another folder"
        )
    return kind


def image_key(image: ImageSource) -> bytes:
    """SHA-256 of an encoded file, or of a size and pixels; InputError for what is neither."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    if isinstance(image, Image.Image | np.ndarray):
        picture = load_image(image)
        return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
    try:
        with Path(image).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise InputError(f"image in {str(image)!r}: {one_line(error)}; check the path") from None


def part_of(folder: Path, name: str, source: Sequence[Sample | Bad], kind: Kind) -> Path:
    """The part of a source, known by its name, its length, and the images of some records."""
    step = -(-len(source) // WITNESSES) or 1
    keys = []
    for record in range(0, len(source), step):
        keys += [seen and seen[0].hex() for seen in _looked_at(source[record], kind)]
    identity = json.dumps([name, len(source), keys])
    return folder / f"part-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def list_images(
    source: Sequence[Sample | Bad], kind: Kind, *, advance: Callable[[int], None]
) -> np.ndarray:
    """An array of IMAGE: those of a source whose headers can be read, each once.

    advance: is told how many records more are done.
    """
    listed: dict[bytes, tuple] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(source), LISTED_AT_ONCE):
            records = range(start, min(start + LISTED_AT_ONCE, len(source)))
            for record, images in zip(
                records, pool.map(lambda r: _looked_at(source[r], kind), records), strict=True
            ):
                for number, found in enumerate(images):
                    if found is not None:
                        key, grid = found
                        listed.setdefault(key, (key, *grid, record, number))
            advance(len(records))
    return np.array(list(listed.values()), IMAGE)


def _looked_at(sample: Sample | Bad, kind: Kind) -> list[tuple[bytes, Grid] | None]:
    """Key and grid of each image; None of one that cannot be read."""
    return (
        [] if isinstance(sample, Bad) else [_key_and_grid(image, kind) for image in sample.images]
    )


def _key_and_grid(image: ImageSource, kind: Kind) -> tuple[bytes, Grid] | None:
    try:
        grid = choose_grid(*image_size(image), tile_size=kind.image_size, max_tiles=kind.max_tiles)
        return image_key(image), grid
    except InputError:
        return None
