"""Checkpoints from one format to another: any size in little memory, and proof that it arrived."""

import hashlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from l32jax import api
from l32jax.checkpoint import adapters, peft
from l32jax.checkpoint.dequantised import dequantised
from l32jax.checkpoint.engine.folders import is_remote
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.transfer import SILENT, Progress, write
from l32jax.checkpoint.engine.workplace import unfinished
from l32jax.checkpoint.formats import Checkpoint, Format, open_checkpoint
from l32jax.config import LlamaConfig
from l32jax.conversion.outputs import OUTPUTS, TOKENIZER_FILES, Content, Kind, losses
from l32jax.conversion.proof import compare_logits, require_equal
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.generate.model import Model, require_matching

QUANTISED = ("q8_0", "q4_0")
To = Format | Literal["peft"]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: To | None = None,
    dtype: Kind | None = None,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    ranks: int | None = None,
    verify: bool = False,
    verify_logits: bool = False,
    resume: bool = False,
    progress: Progress = SILENT,
) -> list[str]:
    """Writes the model, or LoRA adapter, at `source` in another format.

    A model that was trained with LoRA is written with it merged, and its quantised weights as the
    numbers that they stand for. Returns what there is to know about it, a sentence each.

    Args:
      to: by default what the destination's name says (.gguf, .safetensors), else "orbax"; "peft" is
        the adapter alone, of a model that has one.
      dtype: of the weights; by default that of the source. Quantised kinds are GGUF's.
      adapter: a LoRA adapter of the model, PEFT's folder or our file, to be merged.
      base: the model that `source` is an adapter of, which PEFT's folder does not describe; or the
        name to write there.
      tokenizer: its file or folder; by default the source's own.
      ranks: files that Meta's format is split into; by default as Meta does.
      verify: reads both sides again, and compares every tensor, before the destination appears.
      verify_logits: runs both on a prompt; takes the memory of both models, one after the other.
      resume: goes on with a conversion that was stopped, killed, or that ran out of room.
    Raises:
      InputError: the source is damaged, or cannot be said in that format; nothing is written.
      Differs: what was written is not what was read.
      Interrupted: it was asked to stop; `resume` goes on with it.
    """
    if is_adapter(source) or to == "peft":
        return _convert_adapter(source, destination, to, dtype, base, resume, progress)
    to = to or _format_by_name(str(destination))
    _check_request(to, dtype, ranks, destination)
    opened = open_checkpoint(source)
    notes = list(opened.notes)
    checkpoint = _prepared(opened, adapter, None if dtype in QUANTISED else dtype)
    if tokenizer is not None:
        others = {n: c for n, c in checkpoint.files.items() if n not in TOKENIZER_FILES}
        checkpoint = replace(checkpoint, files=others)
    found = _tokenizer(checkpoint, source, tokenizer)
    about = _about(to, source)
    content = Content(checkpoint, found, dtype, ranks, about)
    output = OUTPUTS[to](content)
    task = about | {
        "fingerprint": _fingerprint(source, destination),
        "adapter": adapter and _fingerprint(adapter),
        "tokenizer": tokenizer and _fingerprint(tokenizer),
        "dtype": dtype,
        "ranks": ranks,
    }

    def check(path: Path | str) -> None:
        if verify:
            count = require_equal(content, to, path, progress)
            notes.append(f"verified: {count} tensors are equal, bit by bit")
        if verify_logits:
            notes.append(compare_logits(content, path, exact=dtype not in QUANTISED))

    write(output, destination, task, resume=resume, progress=progress, check=check)
    return notes + losses(content, to)


def save(
    model: Model, destination: str | Path, *, to: Format | None = None, dtype: Kind | None = None
) -> list[str]:
    """Writes a model that is in memory, with its tokenizer, whole or not at all.

    Returns what the format cannot hold, a sentence each. `to` and `dtype` are as for `convert`.
    """
    to = to or _format_by_name(str(destination))
    _check_request(to, dtype, None, destination)
    in_memory = Checkpoint(None, model.config, dequantised(Slices.of(model.params)), {})
    checkpoint = _prepared(in_memory, None, None if dtype in QUANTISED else dtype)
    content = Content(checkpoint, model.tokenizer, dtype, None, _about(to, "memory"))
    write(OUTPUTS[to](content), destination)
    return losses(content, to)


def is_adapter(source: str | Path) -> bool:
    path = Path(source)
    return (path / peft.CONFIG).is_file() or (path.is_file() and adapters.is_ours(path))


def _open_adapter(
    source: str | Path, config: LlamaConfig | None
) -> tuple[adapters.Adapter, LlamaConfig]:
    if Path(source).is_file():
        return adapters.open_ours(Path(source))
    if config is None:
        raise InputError(
            f"adapter {str(source)!r}: PEFT's folder does not describe its model; "
            "give that with --base"
        )
    return peft.open_peft(source, config), config


def _convert_adapter(
    source: str | Path,
    destination: str | Path,
    to: To | None,
    dtype: Kind | None,
    base: str | Path | None,
    resume: bool,
    progress: Progress,
) -> list[str]:
    """To PEFT's folder, or to one file of ours ("safetensors"); every bit kept, if it may be."""
    to = to or ("safetensors" if Path(destination).suffix == ".safetensors" else "peft")
    if to not in ("peft", "safetensors"):
        raise InputError(f"adapter {str(source)!r}: it can be peft or safetensors, not {to}")
    _check_request(to, dtype, None, destination)
    adapter, config = _adapter_at(source, base)
    if dtype is not None:
        adapter = adapter._replace(slices=adapter.slices.as_dtype(np.dtype(dtype)))
    about, name = _about(to, source), None if base is None else str(base)
    if to == "peft":
        output = peft.plan(adapter, config, base_model_name=name, about=about)
    else:
        output = adapters.plan_ours(adapter, config, about=about)
    task = about | {
        "fingerprint": _fingerprint(source, destination),
        "base": name,
        "dtype": dtype,
    }
    write(output, destination, task, resume=resume, progress=progress)
    return []


def _adapter_at(
    source: str | Path, base: str | Path | None
) -> tuple[adapters.Adapter, LlamaConfig]:
    """An adapter's folder or file, or what a model was trained with; and the model beside it."""
    if is_adapter(source):
        known = None if base is None else open_checkpoint(base).config.without_lora()
        return _open_adapter(source, known)
    checkpoint = open_checkpoint(source)
    if not checkpoint.config.loras:
        raise InputError(f"model {str(source)!r}: it has no LoRA to write as peft; choose another")
    _, adapter = adapters.own(checkpoint.slices, checkpoint.config)
    return adapter, checkpoint.config.without_lora()


def _about(to: To, source: str | Path) -> dict[str, Any]:
    return {"format": to, "made_by": f"l32jax {version('l32jax')}", "source": str(source)}


def _format_by_name(destination: str) -> Format:
    by_suffix: dict[str, Format] = {".gguf": "gguf", ".safetensors": "safetensors"}
    return by_suffix.get(Path(destination).suffix, "orbax")


def _check_request(to: To, dtype: Kind | None, ranks: int | None, destination: str | Path) -> None:
    if is_remote(destination) and to != "orbax":
        raise InputError(
            f"destination {str(destination)!r}: only orbax is written to buckets, not {to}; "
            "write it to a disk, and copy it from there"
        )
    if dtype in QUANTISED and to != "gguf":
        raise InputError(f"dtype {dtype!r}: only GGUF has it; choose another, or write --to gguf")
    if ranks is not None and to != "meta":
        raise InputError(f"ranks {ranks}: only Meta's format is split by rank; leave it out")


def _prepared(checkpoint: Checkpoint, adapter: str | Path | None, dtype: str | None) -> Checkpoint:
    """With its own LoRA and the given adapter merged: each sum in float32, and rounded once."""
    slices, config = checkpoint.slices, checkpoint.config.without_lora()
    if dtype is not None and (adapter is not None or checkpoint.config.loras):
        slices = slices.as_dtype(np.float32)
    if checkpoint.config.loras:
        slices = adapters.merged(*adapters.own(slices, checkpoint.config))
    if adapter is not None:
        slices = adapters.merged(slices, _open_adapter(adapter, config)[0])
    if dtype is not None:
        slices = slices.as_dtype(np.dtype(dtype))
    return replace(checkpoint, slices=slices, config=config)


def _tokenizer(
    checkpoint: Checkpoint, source: str | Path, given: str | Path | None
) -> Tokenizer | None:
    """InputError if it is another model's."""
    found = Tokenizer.from_file(given) if given else api.tokenizer_of(checkpoint, source)
    require_matching(found, checkpoint.config, str(given or source))
    return found


def _fingerprint(source: str | Path, destination: str | Path | None = None) -> str:
    """Changes if a file of the source does, in name, size or time.

    The destination may be made inside of the source; what is there of it does not count.
    """
    if is_remote(source):
        return str(source)
    path = Path(source).absolute()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if destination is not None:
        begun = unfinished(Path(destination))
        files = [file for file in files if not file.is_relative_to(begun)]
    lines = [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files if f.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
