"""What a model is written as in each format: its weights, and all that goes with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from l32jax.checkpoint import (
    gguf_write,
    hugging_face,
    hugging_face_tiles,
    meta_files,
    native,
    own_safetensors,
)
from l32jax.checkpoint.engine.folders import is_remote
from l32jax.checkpoint.engine.transfer import Output
from l32jax.checkpoint.formats import Checkpoint, Format
from l32jax.checkpoint.hugging_face_config import TokenIds
from l32jax.config_text import to_json
from l32jax.data import tokenizer_files
from l32jax.data.images import preprocessor_json
from l32jax.data.tokenizer import Tokenizer
from l32jax.data.tokenizer_export import gguf_metadata, hugging_face_files
from l32jax.errors import InputError

Kind = Literal["float32", "float16", "bfloat16", "q8_0", "q4_0"]
GGUF_KINDS: dict[str, gguf_write.KindName] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "q8_0": "Q8_0",
    "q4_0": "Q4_0",
}
EMBEDDING = "decoder/embedding/weight"
TOKENIZER_FILES = {
    *tokenizer_files.FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
}


@dataclass(frozen=True)
class Content:
    """What is written: a checkpoint as it was opened, merged and rounded, and its tokenizer."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    kind: Kind | None
    ranks: int | None
    about: Mapping[str, Any]

    @property
    def gguf_kind(self) -> gguf_write.KindName:
        return GGUF_KINDS[self.kind or str(self.checkpoint.slices.dtypes[EMBEDDING])]


def _hugging_face(content: Content) -> Output:
    checkpoint, tokenizer = content.checkpoint, content.tokenizer
    files = {n: c for n, c in checkpoint.files.items() if n != "tokenizer.model"}
    if "tokenizer.json" not in files and tokenizer is not None:
        vision = checkpoint.config.vision is not None
        files |= hugging_face_files(tokenizer.vocabulary, vision=vision)
    if checkpoint.config.vision is not None:
        files.setdefault("preprocessor_config.json", preprocessor_json(checkpoint.config.vision))
    ids = TokenIds(None, (), None)
    if tokenizer is not None:
        ids = TokenIds(tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id)
    return hugging_face.plan(
        checkpoint.slices, checkpoint.config, ids=ids, about=content.about, extra_files=files
    )


def _meta(content: Content) -> Output:
    checkpoint, tokenizer = content.checkpoint, content.tokenizer
    file = checkpoint.files.get("tokenizer.model")
    if file is None and tokenizer is not None and tokenizer.is_llama3:
        file = tokenizer.to_bytes()
    return meta_files.plan(
        checkpoint.slices,
        checkpoint.config,
        tokenizer=file,
        about=content.about,
        ranks=content.ranks,
    )


def _gguf(content: Content) -> Output:
    if content.tokenizer is None:
        raise InputError("tokenizer of the source: GGUF needs one; give it with --tokenizer")
    checkpoint = content.checkpoint
    return gguf_write.plan(
        checkpoint.slices,
        checkpoint.config,
        kind=content.gguf_kind,
        tokenizer=gguf_metadata(content.tokenizer.vocabulary),
        name=_name(str(content.about["source"])),
        about=content.about,
    )


def _name(source: str) -> str:
    """For people: of a folder all, of a file what is before its format."""
    if is_remote(source):
        return source.rstrip("/").rpartition("/")[2]
    path = Path(source).absolute()
    return path.stem if path.suffix in (".gguf", ".safetensors") else path.name


def _orbax(content: Content) -> Output:
    checkpoint, files = content.checkpoint, dict(content.checkpoint.files)
    if content.tokenizer is not None and files.keys().isdisjoint(tokenizer_files.FILES):
        files |= content.tokenizer.files()
    config_json = f'{{"model": {to_json(checkpoint.config)}}}'
    return native.plan(checkpoint.slices, config_json, files, content.about)


def _safetensors(content: Content) -> Output:
    checkpoint = content.checkpoint
    return own_safetensors.plan(checkpoint.slices, checkpoint.config, about=content.about)


OUTPUTS: Mapping[Format, Callable[[Content], Output]] = {
    "hf": _hugging_face,
    "meta": _meta,
    "gguf": _gguf,
    "orbax": _orbax,
    "safetensors": _safetensors,
}


def losses(content: Content, to: Format) -> list[str]:
    """What the destination's format could not hold."""
    lost = []
    if to == "hf" and content.checkpoint.config.vision is not None:
        lost.append(f"lost: {hugging_face_tiles.LOST_TILES}")
    if content.tokenizer is not None and to == "safetensors":
        lost.append("lost: one safetensors file has no place for a tokenizer; keep it beside")
    if content.tokenizer is not None and to == "meta" and not content.tokenizer.is_llama3:
        lost.append("lost: Meta's format holds only Llama 3's tokenizer, so none is written")
    return lost
