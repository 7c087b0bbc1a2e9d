"""Folders as Meta releases them: `consolidated*.pth`, params.json, tokenizer.model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from l32jax.checkpoint import (
    meta,
    meta_config,
    meta_quantised,
    meta_ranks,
    tensors,
    torch_file,
)
from l32jax.checkpoint.engine.flat_files import FlatFiles
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import Part, theirs
from l32jax.checkpoint.fields import Fields, read_json
from l32jax.checkpoint.meta_config import PARAMS
from l32jax.checkpoint.own_config import located
from l32jax.config import LlamaConfig
from l32jax.errors import InputError

TOKENIZER = "tokenizer.model"
DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))


class Opened(NamedTuple):
    """A folder's model. `notes` are what who converts it should know of it, a line each."""

    config: LlamaConfig
    slices: Slices
    notes: tuple[str, ...]


def open_folder(folder: Path) -> Opened:
    """The model that params.json and the tensors describe, a text or a vision one.

    The head is tied if the files have none, or one that equals the embedding bit by bit.
    InputError if a file is missing or damaged, or a tensor missing, too many or of another shape.
    """
    fields = Fields(read_json(folder / PARAMS), str(folder / PARAMS))
    scheme = meta_quantised.scheme(fields)
    files = _files(folder)
    source = _open(files, folder, scheme)
    with located(str(folder)):
        config = meta_config.from_json(
            fields, source.tensors, tied=_is_tied(source), quantised=scheme is not None
        )
    _require_ranks(len(files), config, folder)
    notes = () if scheme is None else (_not_kept(scheme, folder),)
    return Opened(config, meta.open_tensors(source, config), notes)


def _not_kept(scheme: meta_quantised.Scheme, folder: Path) -> str:
    parts = ["int4 and int8 weights"]
    parts += ["their adaptors"] if scheme.adaptor else []
    parts += ["their rotations"] if scheme.rotated else []
    return (
        f"{folder}: {' and '.join(parts)} are read as plain float32 matrices; that this model was "
        "made to run with activations rounded to int8 is not kept"
    )


def _files(folder: Path) -> list[Path]:
    """One file, or those of the ranks in order."""
    files = sorted(folder.glob("consolidated*.pth"))
    names = [file.name for file in files]
    expected = [f"consolidated.{rank:02}.pth" for rank in range(len(files))]
    if not files or names not in (["consolidated.pth"], expected):
        missing = next((name for name in expected if name not in names), "consolidated.00.pth")
        raise InputError(
            f"weights in {folder}: of {len(files)} files consolidated*.pth none is {missing!r}; "
            "download the whole folder, into an empty one"
        )
    return [tensors.inside(folder, name) for name in names]


def _open(files: list[Path], folder: Path, scheme: meta_quantised.Scheme | None) -> Source:
    """Whole tensors of floating-point numbers under Meta's names."""
    source = meta_ranks.joined([torch_file.open_file(file) for file in files], str(folder))
    if scheme is not None:
        if len(files) > 1:
            raise InputError(
                f"weights in {folder}: quantised checkpoints are read from one file only, not "
                f"from {len(files)}; give Meta's release"
            )
        source = meta_quantised.dequantised(source, scheme)
    for name, tensor in source.tensors.items():
        if tensor.dtype not in DTYPES and not name.endswith(meta.ROTARY):
            raise InputError(
                f"tensor {name!r} in {folder}: dtype {tensor.dtype.name}, expected float32, "
                f"float16 or bfloat16, as {PARAMS} does not say that it is quantised"
            )
    return source


def _is_tied(source: Source) -> bool:
    prefix = "text_model." if "text_model.tok_embeddings.weight" in source.tensors else ""
    head, embedding = f"{prefix}output.weight", f"{prefix}tok_embeddings.weight"
    if head not in source.tensors:
        return True
    # A quantised head and embedding were one once; they are now if they were rounded alike.
    return meta_ranks.equal(source, head, source, embedding)


def _require_ranks(ranks: int, config: LlamaConfig, where: Path | str) -> None:
    if not 1 <= ranks <= config.decoder.num_kv_heads:
        raise InputError(
            f"{ranks} ranks in {where}: each needs a key and value head of its own, there are "
            f"{config.decoder.num_kv_heads}; use at most as many ranks"
        )


def plan(
    slices: Slices,
    config: LlamaConfig,
    *,
    tokenizer: bytes | None,
    about: Mapping[str, Any],
    ranks: int | None = None,
) -> FlatFiles:
    """A folder that llama-models loads; the weights have the dtypes of `slices`.

    `ranks` is the number of files and of devices that it then needs; by default that of the
    releases, which is 8 for models of more than 32 heads and else 1. InputError for a model that
    Meta's format cannot express.
    """
    if ranks is None:
        ranks = 8 if config.decoder.num_heads > 32 else 1
    _require_ranks(ranks, config, "the files to write")
    parts = list(meta.table(config))
    if config.decoder.tied_embedding:
        # llama-models has a head in every model, and loads no file without.
        parts.append(Part("decoder/embedding/weight", meta.head(config)))
    source = theirs(parts, slices)
    files = [
        torch_file.plan_file(
            meta_ranks.shard(source, rank, ranks), source.tensors, f"consolidated.{rank:02}.pth"
        )
        for rank in range(ranks)
    ]
    small = {PARAMS: (json.dumps(meta_config.to_json(config), indent=2) + "\n").encode()}
    if tokenizer is not None:
        small[TOKENIZER] = tokenizer
    return FlatFiles(files, about, small)
