"""Safetensors files: read mapped into memory, and planned to be written."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from l32jax.checkpoint.engine.flat_files import FlatFile, Place
from l32jax.checkpoint.engine.mapped import Mapped
from l32jax.checkpoint.engine.slices import Shape
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.transfer import runs
from l32jax.checkpoint.fields import read_json
from l32jax.config_text import short
from l32jax.errors import InputError, one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the tensors in a file
MAX_DIMS, MAX_NAME = 8, 200  # the latter of a file
PYTORCH = {"format": "pt"}  # transformers insists


def open_directory(directory: Path) -> Source:
    """The tensors of `model.safetensors`, or of the files that its index lists; nothing is read.

    InputError if a file is damaged or outside of the directory, if the index is wrong about a
    tensor, or if a dtype is none of float32, float16, bfloat16.
    """
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        return open_file(inside(directory, WEIGHTS))
    index = inside(directory, INDEX)
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"weights in {index}: 'weight_map' must map tensors to files")
    paths = [inside(directory, file) for file in sorted(set(listed.values()))]
    sources = [open_file(path) for path in paths]
    for path, source in zip(paths, sources, strict=True):
        expected = {name for name, file in listed.items() if file == path.name}
        if wrong := expected ^ source.tensors.keys():
            raise InputError(
                f"weights in {path}: tensor {min(wrong)!r:.200} is in the file or in "
                f"{INDEX}, not in both; download the two again"
            )
    return joined(sources, str(directory))


def joined(sources: Sequence[Source], where: str) -> Source:
    """The tensors of several files; no name is in two of them."""
    owner = {name: source for source in sources for name in source.tensors}

    def release() -> None:
        for source in sources:
            source.release()

    tensors = {name: source.tensors[name] for name, source in owner.items()}
    return Source(where, tensors, lambda name, rows: owner[name].read(name, rows), release)


def inside(directory: Path, name: str) -> Path:
    """The file of that name, which an index of unknown origin may not lead elsewhere.

    Links are followed inside of the directory, and to the `blobs` of Hugging Face's cache.
    """
    path = directory / name
    plain = Path(name).name == name and name not in ("", "..") and len(name) <= MAX_NAME
    if not plain or not name.isprintable() or "\\" in name:
        raise InputError(
            f"weights in {directory}: {short(name)} is not the name of a file in there"
        )
    if not path.is_file():
        only = "; only safetensors are read" if name.endswith(".safetensors") else ""
        raise InputError(f"weights in {directory}: there is no file {name!r}{only}")
    home = directory.resolve()
    homes = [home, *(p.parent / "blobs" for p in home.parents if p.name == "snapshots")]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise InputError(
            f"weights in {directory}: {name!r} links to {path.resolve()}, outside of it"
        )
    return path


def open_file(path: Path) -> Source:
    """A mapped file; nothing but its header is read."""
    arrays, release = open_arrays(path)
    return Source.of(arrays, str(path), release)


def open_arrays(path: Path) -> tuple[dict[str, np.ndarray], Callable[[], None]]:
    """Views of a mapped file, and what lets go of their pages.

    InputError if the file is damaged: safetensors checks bounds, overlaps and sizes.
    """
    header, begin = _header(path)
    header.pop("__metadata__", None)
    mapped = Mapped(path)
    content = mapped.content[begin:]
    views = {name: _view(content, entry, name, path) for name, entry in header.items()}
    return views, mapped.release


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself beside its tensors."""
    return _header(path)[0].get("__metadata__", {})


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights in {path}: {one_line(error)}; download the file again") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _view(content: np.ndarray, entry: dict[str, Any], name: str, path: Path) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"tensor {name!r:.200} in {path}: dtype {entry['dtype']}, expected "
            f"{', '.join(DTYPES)}; quantised weights are not read from this format"
        )
    if len(entry["shape"]) > MAX_DIMS:
        raise InputError(
            f"tensor {name!r:.200} in {path}: it has {len(entry['shape'])} dimensions, at most "
            f"{MAX_DIMS} are read"
        )
    begin, end = entry["data_offsets"]
    return content[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def plan_files(source: Source, max_file_bytes: int) -> list[FlatFile]:
    """`model.safetensors`, or several files if one would be too large; see `index_of`."""
    parts = runs(source.tensors, lambda name: source.tensors[name].nbytes, max_file_bytes)
    if len(parts) == 1:
        return [plan_file(source, parts[0], WEIGHTS)]
    return [
        plan_file(source, names, f"model-{number:05}-of-{len(parts):05}.safetensors")
        for number, names in enumerate(parts, start=1)
    ]


def index_of(files: Sequence[FlatFile]) -> bytes:
    """The content of `model.safetensors.index.json`."""
    total = sum(place.size for file in files for place in file.places.values())
    weight_map = {name: file.name for file in files for name in file.places}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()


def plan_file(
    source: Source,
    names: Iterable[str],
    file: str,
    metadata: Mapping[str, str] = PYTORCH,
    shapes: Mapping[str, Shape] | None = None,
) -> FlatFile:
    """One file of these tensors, in this order, each in the dtype that the source gives.

    `shapes` are what the file says of them, where that is not what the source says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = source.tensors[name]
        begin, end = end, end + tensor.nbytes
        dtype, shape = DTYPE_NAMES[tensor.dtype], list((shapes or {}).get(name, tensor.shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    del header["__metadata__"]
    places = {
        name: Place(len(head) + entry["data_offsets"][0], source.tensors[name].nbytes)
        for name, entry in header.items()
    }
    return FlatFile(file, len(head) + end, head, source, places)
