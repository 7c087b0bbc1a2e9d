"""Which format a path holds, by its content, and one way to open them all."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from l32jax.checkpoint import (
    gguf,
    hugging_face,
    hugging_face_config,
    hugging_face_tiles,
    meta_files,
    native,
    own_safetensors,
)
from l32jax.checkpoint.engine.folders import is_remote
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.steps import is_step, is_store
from l32jax.checkpoint.tensors import inside
from l32jax.config import LlamaConfig
from l32jax.errors import InputError

Format = Literal["hf", "meta", "gguf", "orbax", "safetensors"]
# What goes with the weights of a Hugging Face or Meta folder, of its tokenizer and image processor.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
MAX_COMPANION_BYTES = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, opened; of its weights nothing is read yet.

    Attributes:
      format: None of a model in memory.
      files: those of its tokenizer and image processor, by name; none for GGUF, whose tokenizer is
        in the file.
      notes: what of the model is not in this format, or not read from it, a sentence each.
    """

    format: Format | None
    config: LlamaConfig
    slices: Slices
    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


def open_checkpoint(where: str | Path, *, verified: bool = True) -> Checkpoint:
    """A folder of Hugging Face's or Meta's, a GGUF or safetensors file, or what training saved.

    That is a run, one of its stages (runs/a/1_trunk) or steps (runs/a/1_trunk/500). A converted
    checkpoint may also be at gs://bucket/path or s3://bucket/path. With `verified`, a local one of
    ours is held against its digests first, which reads all of it.
    """
    if is_remote(where) or is_step(where):
        return _native(where, verified)
    path = Path(where)
    if not path.exists():
        raise InputError(f"model {str(path)!r}: no such file or folder; check the path")
    if path.is_file():
        return _file(path)
    if (path / hugging_face_config.CONFIG).is_file():
        inside(path, hugging_face_config.CONFIG)
        config = hugging_face_config.read_config(path)
        slices = hugging_face.open_directory(path, config)
        notes = (hugging_face_tiles.LOST_TILES,) if config.vision else ()
        return Checkpoint("hf", config, slices, _companions(path), notes)
    if (path / meta_files.PARAMS).is_file():
        inside(path, meta_files.PARAMS)
        opened = meta_files.open_folder(path)
        return Checkpoint("meta", opened.config, opened.slices, _companions(path), opened.notes)
    return _native(newest_store(path), verified)


def _file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(16)
    if start[:4] == b"GGUF":
        config = gguf.read_config(path)
        return Checkpoint("gguf", config, gguf.open_file(path, config), {})
    if start[8:9] == b"{":
        config, slices = own_safetensors.open_model(path)
        return Checkpoint("safetensors", config, slices, {})
    raise InputError(
        f"model {str(path)!r}: the file is neither GGUF nor safetensors; "
        "of other formats give the folder"
    )


def _native(where: str | Path, verified: bool) -> Checkpoint:
    store = native.open_store(where, verified=verified)
    return Checkpoint("orbax", store.config, store.slices, store.files)


def newest_store(path: Path) -> Path:
    """The checkpoint directory at `path`, or that of the last stage of the run at `path`."""
    if is_store(path):
        return path
    children = path.iterdir() if path.is_dir() else ()  # it may be a pipe or a device
    stages = sorted((child for child in children if is_store(child)), key=_stage_number)
    if not stages:
        raise InputError(
            f"model {str(path)!r}: no config.json, params.json or checkpoint; give a folder of "
            "Hugging Face's or Meta's, a .gguf file or the folder of a run"
        )
    return stages[-1]


def _stage_number(path: Path) -> tuple[int, str]:
    number = path.name.partition("_")[0]
    return (int(number) if number.isdecimal() else -1, path.name)


def _companions(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in COMPANIONS:
        if not (folder / name).is_file():
            continue
        path = inside(folder, name)
        if path.stat().st_size > MAX_COMPANION_BYTES:
            raise InputError(
                f"{path}: more than {MAX_COMPANION_BYTES >> 20} MiB; is it the right file?"
            )
        found[name] = path.read_bytes()
    return found
