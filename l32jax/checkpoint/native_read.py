"""The arrays of our own format, read by the chunk through tensorstore; Orbax is not needed.

They are zarr arrays in one OCDBT, by names like params/decoder/embedding/weight. The content may
come from anywhere, and is believed in nothing. What OCDBT refers to lies below its folder: that
much tensorstore sees to.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from l32jax.checkpoint.arrays import require_equal
from l32jax.checkpoint.dequantised import INTEGERS, SCALES, VALUES, dequantised
from l32jax.checkpoint.engine.folders import Folder, fresh_context, read_at_most
from l32jax.checkpoint.engine.slices import Home, Shape, Slices
from l32jax.errors import InputError

METADATA = "_METADATA"
PARAMS = "params/"
DTYPES = {  # by their names in zarr
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "|i1": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),
}
MAX_HEADER_BYTES = 1 << 16
MAX_CHUNK_BYTES = 16 << 30  # of a parameter that training saved from one device
KEPT_BYTES = 128 << 20  # of decoded chunks, for the rows that come next


@dataclass(frozen=True)
class _Header:
    """What a .zarray says, checked: nothing has been allocated for it yet."""

    shape: Shape
    dtype: np.dtype
    chunk: Shape

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize


def open_arrays(folder: Folder, shapes: Mapping[str, Shape]) -> Slices:
    """Those below params/, which must be those of the model; training has others beside them.

    Weights that training kept quantised are float32.
    """
    names = [name for name in _names(folder) if name.startswith(PARAMS)]
    with folder.reading():
        spec = {"driver": "ocdbt", "base": folder.base}
        store = ts.KvStore.open(spec, context=fresh_context()).result()
        headers = {name: _header(store, name, folder.where) for name in names}
        shapes = _as_saved(headers, shapes)
        _require_model(headers, shapes, folder.where)
        largest = max(header.chunk_bytes for header in headers.values())
        # A chunk of many layers is decoded once for all of them; its entry has some more bytes.
        context = fresh_context(max(KEPT_BYTES, largest + largest // 8))
        futures = {path: _open(spec, PARAMS + path, context) for path in shapes}
        arrays = {path: future.result() for path, future in futures.items()}

    def read(home: Home, rows: slice) -> View:
        array = arrays[home.path]
        array = array if home.layer is None else array[home.layer]
        if array.rank:
            array = array[slice(*rows.indices(array.shape[0])[:2])]
        return View(array, folder)

    dtypes = {path: headers[PARAMS + path].dtype for path in shapes}
    return dequantised(Slices(folder.where, shapes, dtypes, read))


def _names(folder: Folder) -> list[str]:
    content = folder.read_json(METADATA)
    if content.get("use_zarr3") is not False or content.get("use_ocdbt") is not True:
        raise InputError(f"arrays in {folder.where}: not zarr2 in OCDBT; save them with l32jax")
    try:
        keys = [entry["key_metadata"] for entry in content["tree_metadata"].values()]
        return [key["key"] + "" for (key,) in keys]  # a TypeError unless it is a string
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"arrays in {folder.where}: {METADATA} does not list them by name; "
            "save them with l32jax"
        ) from None


def _header(store: ts.KvStore, name: str, where: str) -> _Header:
    """InputError unless it is one that training or `convert` writes."""
    text = read_at_most(store, f"{name}/.zarray", MAX_HEADER_BYTES, where)
    match _json(text or b""):
        case {
            "zarr_format": 2,
            "order": "C",
            "filters": None,
            "shape": [*shape],
            "chunks": [*chunk],
            "dtype": str(dtype),
            "compressor": None | {"id": "zstd"},
        } if dtype in DTYPES and _fits(chunk, shape):
            header = _Header(tuple(shape), DTYPES[dtype], tuple(chunk))
            if header.chunk_bytes <= MAX_CHUNK_BYTES:
                return header
    raise InputError(
        f"array {name!r} in {where}: its .zarray is not one that l32jax writes; "
        "copy the checkpoint again"
    )


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _fits(chunk: list[Any], shape: list[Any]) -> bool:
    """A larger chunk would cost memory for nothing."""
    if len(chunk) != len(shape) or not all(type(size) is int for size in [*chunk, *shape]):
        return False
    return all(1 <= part <= size for part, size in zip(chunk, shape, strict=True))


def _as_saved(headers: Mapping[str, _Header], shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Quantised weights are two arrays; `dequantised` looks at the shapes of their scales."""
    found = dict(shapes)
    for path, shape in shapes.items():
        if header := headers.get(PARAMS + path + SCALES):
            del found[path]
            found |= {path + VALUES: shape, path + SCALES: header.shape}
    return found


def _require_model(headers: Mapping[str, _Header], shapes: Mapping[str, Shape], where: str) -> None:
    wanted = {}
    for path, shape in shapes.items():
        header = headers.get(PARAMS + path)
        dtype = header.dtype if header else np.dtype(np.float32)
        if path.endswith(VALUES) != (dtype in INTEGERS):  # of integers there are no others
            dtype = np.dtype(np.int8 if path.endswith(VALUES) else np.float32)
        wanted[PARAMS + path] = jax.ShapeDtypeStruct(shape, dtype)
    require_equal(wanted, headers, where)


def _open(store: Mapping[str, Any], name: str, context: ts.Context) -> ts.Future:
    spec = {
        "driver": "zarr",
        "kvstore": {**store, "path": f"{name}/"},
        "fill_missing_data_reads": False,  # a chunk that is not there is not all zeros
    }
    return ts.open(spec, read=True, context=context)


@dataclass(frozen=True)
class View:
    """Part of an array, which `np.asarray` reads: just the chunks that it touches."""

    array: ts.TensorStore
    folder: Folder

    def __getitem__(self, index: Any) -> "View":
        array = self.array
        origin = array.translate_to[(0,) * array.rank] if array.rank else array
        return View(origin[index], self.folder)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with self.folder.reading():
            return np.asarray(self.array.read().result(), dtype)
