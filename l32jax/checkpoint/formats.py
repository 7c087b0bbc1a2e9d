"""Which format a path holds, by its content, and one way to read them all."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l32jax.checkpoint import gguf, hugging_face, hugging_face_config
from l32jax.checkpoint.slices import load
from l32jax.checkpoint.steps import is_store
from l32jax.checkpoint.store import Reader
from l32jax.config import LlamaConfig
from l32jax.config_text import decode
from l32jax.errors import InputError
from l32jax.model.parameters import Params


class Weights(NamedTuple):
    """A model on disk.

    read: fills targets (shapes, dtypes, shardings) of its configuration.
    dtype: the one that targets must have; None if any will do.
    tokenizer: content of its tokenizer.model, where that stands inside the checkpoint and not at
      the path.
    """

    config: LlamaConfig
    read: Callable[[Params], Params]
    dtype: Any = None
    tokenizer: bytes | None = None


def open_weights(path: Path) -> Weights:
    """Looks at a Hugging Face folder, a GGUF file, the folder of a run or of one of its stages."""
    if not path.exists():
        raise InputError(f"model {str(path)!r}: no such file or folder; check the path")
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise InputError(f"model {str(path)!r}: the file is not GGUF; give GGUF or a folder")
        config = gguf.read_config(path)
        return Weights(config, partial(load, gguf.open_file(path, config)))
    if (path / "config.json").is_file():
        config = hugging_face_config.read_config(path)
        return Weights(config, partial(load, hugging_face.open_directory(path, config)))
    return _open_store(newest_store(path))


def newest_store(path: Path) -> Path:
    """The checkpoint directory at `path`, or that of the last stage of the run at `path`."""
    if is_store(path):
        return path
    stages = sorted((child for child in path.iterdir() if is_store(child)), key=_stage_number)
    if not stages:
        raise InputError(
            f"model {str(path)!r}: no config.json, no checkpoint; "
            "give a Hugging Face folder, a .gguf file or the folder of a run"
        )
    return stages[-1]


def _stage_number(path: Path) -> tuple[int, str]:
    number = path.name.partition("_")[0]
    return (int(number) if number.isdecimal() else -1, path.name)


def _open_store(path: Path) -> Weights:
    reader = Reader(path)
    content: Any = json.loads(reader.read_config())
    config = decode(LlamaConfig, content["model"], f"config of {path}")
    return Weights(
        config,
        reader.restore_params,
        dtype=np.float32,  # of the parameters that train; Orbax would cast without a word
        tokenizer=reader.read_file("tokenizer.model"),
    )
