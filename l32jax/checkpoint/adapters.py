"""LoRA adapters: what they are, merged into their model, and in a file of our own.

An adapter of `X/weight` [outs ins] is `X/lora_a` [r ins] and `X/lora_b` [outs r]. It stands for
weight + scale * lora_b @ lora_a; layers are stacked as the weight's are.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l32jax.checkpoint import own_config, own_safetensors, tensors
from l32jax.checkpoint.engine.flat_files import FlatFiles
from l32jax.checkpoint.engine.slices import ALL, Home, Shape, Slices
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import ours, their_shapes
from l32jax.checkpoint.engine.tables import theirs as as_theirs
from l32jax.checkpoint.fields import Fields
from l32jax.config import LlamaConfig
from l32jax.errors import InputError
from l32jax.model.llama import shapes_of
from l32jax.model.parameters import is_lora, is_stacked

METADATA_KEY, FILE = "l32jax_adapter", "adapter.safetensors"
MAX_RANK = 4096  # far above those in use; bounds what a file can cost
BLOCK_BYTES = 1 << 20  # of a merged weight, in float32: what a processor's cache holds
HEADED = ("query", "key", "value")  # projections whose outputs are [heads, head_dim]


class Adapter(NamedTuple):
    """LoRA of some of a model's weights: `slices` has their lora_a and lora_b, nothing else.

    All have one rank. A layer of a stacked weight that has no adapter of its own has zeros.
    """

    slices: Slices
    rank: int
    scale: float

    @property
    def weights(self) -> list[str]:
        """Paths of what it adapts."""
        return list(dict.fromkeys(weight_of(path) for path in self.slices.shapes))


def weight_of(path: str) -> str:
    """The path of the weight that a lora_a or lora_b belongs to."""
    return f"{path.rpartition('/')[0]}/weight"


def pair_of(weight: str) -> tuple[str, str]:
    """The paths of a weight's lora_a and lora_b."""
    prefix = weight.removesuffix("weight")
    return f"{prefix}lora_a", f"{prefix}lora_b"


def can_be_adapted(path: str) -> bool:
    """Whether a parameter is the weight of a linear map, rather than of an embedding or norm."""
    return path.endswith("/weight") and "embedding" not in path


def shapes(weights: Iterable[str], model: Mapping[str, Shape], rank: int) -> dict[str, Shape]:
    """Of lora_a and lora_b of these weights in a model of these shapes."""
    result = {}
    for weight in weights:
        a, b = pair_of(weight)
        shape, begin = model[weight], 1 if is_stacked(weight) else 0
        end = begin + (2 if weight.split("/")[-2] in HEADED else 1)
        result[a], result[b] = (*shape[:begin], rank, *shape[end:]), (*shape[:end], rank)
    return result


def _require_fit(
    found: Mapping[str, Shape], rank: int, where: str, model: Mapping[str, Shape], model_where: str
) -> None:
    """InputError unless an adapter of these shapes is one of a model of those."""
    known = [w for w in map(weight_of, found) if w in model and can_be_adapted(w)]
    expected = shapes(known, model, rank)
    for path in [*found, *expected]:
        if found.get(path) != expected.get(path):
            raise InputError(
                f"adapter in {where}: {path!r:.200} is {_said(found.get(path))}, and "
                f"{_said(expected.get(path))} for {model_where}; take the model it was trained with"
            )


def _said(shape: Shape | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"


def own(slices: Slices, config: LlamaConfig) -> tuple[Slices, Adapter]:
    """A model with LoRA as the model without it, and its adapter. Its config says the scale."""
    lora = config.loras[0]
    theirs = {path: shape for path, shape in slices.shapes.items() if is_lora(path)}
    rest = {path: shape for path, shape in slices.shapes.items() if path not in theirs}
    return replace(slices, shapes=rest), Adapter(
        replace(slices, shapes=theirs), lora.rank, lora.scale
    )


def merged(slices: Slices, adapter: Adapter) -> Slices:
    """The model with its adapter in its weights, each sum computed in float32 and rounded once.

    Dtypes stay those of `slices`: of another dtype, `merged(slices.as_dtype(np.float32), adapter)
    .as_dtype(dtype)` rounds once as well. InputError if the adapter does not fit.
    """
    theirs, own = adapter.slices, slices.shapes
    _require_fit(theirs.shapes, adapter.rank, theirs.where, own, f"the model in {slices.where}")
    adapted = frozenset(adapter.weights)

    def read(home: Home, rows: slice) -> Any:
        values = slices.read(home, rows)
        if home.path not in adapted:
            return values
        a, b = (Home(path, home.layer) for path in pair_of(home.path))
        return _sum(
            np.asarray(values).astype(slices.dtypes[home.path], copy=False),
            np.asarray(theirs.read(a, ALL)),
            np.asarray(theirs.read(b, rows)),
            adapter.scale,
        )

    def release() -> None:
        slices.release()
        theirs.release()

    return replace(slices, read=read, release=release)


def _sum(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """weight [rows outs ins] + scale * b [rows outs r] @ a [r ins], in the weight's dtype."""
    result = np.empty(weight.shape, weight.dtype)
    if not result.size:
        return result
    scaled = a.astype(np.float32).reshape(len(a), -1) * np.float32(scale)
    b = b.astype(np.float32).reshape(-1, len(a))
    weight, flat = weight.reshape(len(b), -1), result.reshape(len(b), -1)
    size = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    block = np.empty((min(size, len(b)), weight.shape[1]), np.float32)
    for start in range(0, len(b), size):
        rows = slice(start, min(start + size, len(b)))
        total = np.matmul(b[rows], scaled, out=block[: rows.stop - start])
        total += weight[rows]
        flat[rows] = total
    return result


def is_ours(path: Path) -> bool:
    """Whether the file is safetensors that `plan_ours` describes."""
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    return is_safetensors and METADATA_KEY in tensors.read_metadata(path)


def open_ours(path: Path) -> tuple[Adapter, LlamaConfig]:
    """A file that `plan_ours` describes, and the configuration of its model.

    InputError if the file is damaged, is not one of these, or does not fit its own config.
    """
    text = tensors.read_metadata(path).get(METADATA_KEY)
    if text is None:
        raise InputError(f"adapter in {path}: the file is no adapter of ours; give a PEFT folder")
    fields = Fields(own_config.parsed(text, str(path)), f"adapter in {path}")
    rank, scale = fields.size("rank", at_most=MAX_RANK), fields.number("scale")
    config = own_config.read(fields.get("config"), str(path))
    fields.close()
    arrays, release = tensors.open_arrays(path)
    found = {name: array.shape for name, array in arrays.items()}
    _require_fit(found, rank, str(path), shapes_of(config), "its own config")
    table = own_safetensors.table(found)
    in_rows = their_shapes(table, found)
    rows = {name: array.reshape(in_rows[name]) for name, array in arrays.items()}
    return Adapter(ours(table, Source.of(rows, str(path), release), found), rank, scale), config


def plan_ours(adapter: Adapter, config: LlamaConfig, *, about: Mapping[str, Any]) -> FlatFiles:
    """One safetensors file of the arrays under our paths, with all else in its metadata."""
    slices = adapter.slices
    source = as_theirs(own_safetensors.table(slices.shapes), slices)
    content = {"rank": adapter.rank, "scale": adapter.scale, "config": asdict(config)}
    metadata = {METADATA_KEY: json.dumps(content)}
    file = tensors.plan_file(source, source.tensors, FILE, metadata, shapes=slices.shapes)
    return FlatFiles([file], about, single=FILE)
