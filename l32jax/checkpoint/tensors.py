"""Safetensors files: mapped into memory to read, written tensor by tensor."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from l32jax.checkpoint.fields import read_json
from l32jax.checkpoint.tables import Shape, Source
from l32jax.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the tensors in a file


def open_directory(directory: Path) -> Source:
    """The tensors of `model.safetensors`, or of the files that its index lists; nothing is read.

    InputError if a file is damaged or outside of the directory, if the index is wrong about a
    tensor, or if a dtype is none of float32, float16, bfloat16.
    """
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        tensors = _open(_inside(directory, WEIGHTS))
    else:
        tensors = _open_indexed(directory)
    return Source.of(tensors, str(directory))


def _open_indexed(directory: Path) -> dict[str, np.ndarray]:
    index = _inside(directory, INDEX)
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"weights in {index}: 'weight_map' must map tensors to files")
    found: dict[str, np.ndarray] = {}
    files = {file: _inside(directory, file) for file in sorted(set(listed.values()))}
    for file, path in files.items():
        tensors = _open(path)
        wrong = {name for name, where in listed.items() if where == file} ^ tensors.keys()
        if wrong:
            raise InputError(
                f"weights in {path}: tensor {min(wrong)!r} is in the file or in "
                f"{INDEX}, not in both; download the two again"
            )
        found |= tensors
    return found


def _inside(directory: Path, name: str) -> Path:
    """The file of that name, which an index of unknown origin may not lead elsewhere.

    Links are followed inside of the directory, and to the `blobs` of Hugging Face's cache.
    """
    path = directory / name
    plain = Path(name).name == name and name not in ("", "..")
    if not plain or not name.isprintable() or "\\" in name:
        raise InputError(f"weights in {directory}: {name!r} is not the name of a file in there")
    if not path.is_file():
        raise InputError(
            f"weights in {directory}: there is no file {name!r}; only safetensors are read"
        )
    home = directory.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise InputError(
            f"weights in {directory}: {name!r} links to {path.resolve()}, outside of it"
        )
    return path


def _open(path: Path) -> dict[str, np.ndarray]:
    """Views of a mapped file, whose header safetensors has checked: bounds, overlaps, sizes."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights in {path}: {error}; download the file again") from None
    content = np.asarray(np.memmap(path, np.uint8, mode="r"))
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:begin].tobytes())
    header.pop("__metadata__", None)
    return {name: _view(content[begin:], entry, name, path) for name, entry in header.items()}


def _view(content: np.ndarray, entry: dict[str, Any], name: str, path: Path) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"tensor {name!r} in {path}: dtype {entry['dtype']}, expected {', '.join(DTYPES)}; "
            "quantised weights are not read from this format"
        )
    begin, end = entry["data_offsets"]
    return content[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def save_directory(
    directory: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, Shape],
    dtype: Any,
    max_file_bytes: int,
) -> None:
    """Writes `model.safetensors`, or several files and their index if one would be too large.

    `shapes` are those of `tensors`, in the same order; one tensor at a time is in memory.
    """
    dtype = np.dtype(dtype)
    files = _split(shapes, dtype, max_file_bytes)
    stream = iter(tensors)
    if len(files) == 1:
        _save(directory / WEIGHTS, stream, shapes, dtype)
        return
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        part = {name: shapes[name] for name in names}
        _save(directory / file, islice(stream, len(names)), part, dtype)
        weight_map |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(shapes: Mapping[str, Shape], dtype: np.dtype, max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in order."""
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if used + size > max_bytes and files[-1]:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _save(
    path: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), (expected, shape) in zip(tensors, shapes.items(), strict=True):
            assert name == expected and tensor.shape == shape and tensor.dtype == dtype, name
            file.write(np.ascontiguousarray(tensor).view(np.uint8).data)
