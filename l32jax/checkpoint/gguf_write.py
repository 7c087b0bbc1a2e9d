"""GGUF files of Llama text models, written with the keys and tensors of llama.cpp's converter."""

import struct
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from l32jax.checkpoint import gguf_kinds
from l32jax.checkpoint.engine.flat_files import FlatFile, FlatFiles, Place
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.sources import Source, Tensor
from l32jax.checkpoint.engine.tables import ours, theirs
from l32jax.checkpoint.gguf import NO_VISION, ROPE_DIVISORS, rope_divisors, table
from l32jax.checkpoint.gguf_file import ALIGNMENT, ARRAY, MAGIC, STRING, VERSIONS
from l32jax.checkpoint.gguf_kinds import F16, F32, Kind
from l32jax.checkpoint.tensors import joined
from l32jax.config import DecoderConfig, LlamaConfig
from l32jax.errors import InputError

KindName = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # llama_ftype of llama.h
QUANTIZATION_VERSION = 2
TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
UNUSED = 5  # the type of a token that no text has
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7


def plan(
    slices: Slices,
    config: LlamaConfig,
    *,
    kind: KindName,
    tokenizer: Mapping[str, Any],
    name: str,
    about: Mapping[str, Any],
) -> FlatFiles:
    """One file that llama.cpp loads.

    Args:
      kind: of the matrices. Norms are F32. A matrix whose rows do not fill blocks is F16, and with
        Q4_0 the one that logits come from is Q8_0.
      tokenizer: entries of the metadata; ints become UINT32, in lists INT32. Tokens that the model
        has beyond them are filled in as unused.
      name: for people.

    InputError for vision models, for more tokens than the model has, and once it is written for
    values beyond what the kind can hold.
    """
    if config.vision is not None:
        raise InputError(f"a vision model as GGUF: {NO_VISION}")
    source = _source(slices, config)
    kinds = _kinds(source, config, kind)
    places, end = {}, 0
    for tensor, known in source.tensors.items():
        size = kinds[tensor].nbytes(known.shape)
        places[tensor] = Place(end, size, _encoder(tensor, kinds[tensor], slices.where))
        end += _padded(size)
    metadata = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": name,
        **_hyperparameters(config.decoder),
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
        **_filled(tokenizer, config.decoder.vocab_size),
    }
    head = _head(metadata, source, kinds, places)
    places = {n: place._replace(offset=len(head) + place.offset) for n, place in places.items()}
    file = FlatFile("model.gguf", len(head) + end, head, source, places)
    return FlatFiles([file], about, single=file.name)


def kept(slices: Slices, config: LlamaConfig, kind: KindName) -> Slices:
    """What is left of a model that was in such a file: its values packed and unpacked."""
    source = _source(slices, config)
    kinds = _kinds(source, config, kind)

    def read(name: str, rows: slice) -> np.ndarray:
        stored = np.ascontiguousarray(kinds[name].pack(source.read(name, rows)))
        return kinds[name].unpack(stored.view(np.uint8))

    tensors = {n: Tensor(t.shape, kinds[n].dtype) for n, t in source.tensors.items()}
    unpacked = Source(source.where, tensors, read, source.release)
    return ours(table(config), unpacked, slices.shapes, ignore={ROPE_DIVISORS})


def _kinds(source: Source, config: LlamaConfig, kind: KindName) -> dict[str, Kind]:
    return {
        name: _kind_of(name, tensor, config.decoder, gguf_kinds.named(kind))
        for name, tensor in source.tensors.items()
    }


def _source(slices: Slices, config: LlamaConfig) -> Source:
    source, divisors = theirs(table(config), slices), rope_divisors(config.decoder)
    if divisors is None:
        return source
    return joined([Source.of({ROPE_DIVISORS: divisors}, slices.where), source], slices.where)


def _kind_of(name: str, tensor: Tensor, decoder: DecoderConfig, kind: Kind) -> Kind:
    if len(tensor.shape) == 1:
        return F32
    logits = "token_embd.weight" if decoder.tied_embedding else "output.weight"
    if name == logits and kind.name == "Q4_0":
        kind = gguf_kinds.named("Q8_0")  # llama.cpp takes Q6_K, which only it can pack
    return F16 if tensor.shape[-1] % kind.block else kind


def _encoder(name: str, kind: Kind, where: str) -> Callable[[np.ndarray], np.ndarray]:
    def encode(values: np.ndarray) -> np.ndarray:
        try:
            return kind.pack(values)
        except InputError as error:
            raise InputError(f"tensor {name!r} in {where}: {error}") from None

    return encode


def _hyperparameters(decoder: DecoderConfig) -> dict[str, Any]:
    values = {
        "block_count": decoder.num_layers,
        "context_length": decoder.max_context,
        "embedding_length": decoder.embed_dim,
        "feed_forward_length": decoder.mlp_dim,
        "attention.head_count": decoder.num_heads,
        "attention.head_count_kv": decoder.num_kv_heads,
        "rope.freq_base": float(decoder.rope_theta),
        "attention.layer_norm_rms_epsilon": float(decoder.norm_eps),
        "attention.key_length": decoder.head_dim,
        "attention.value_length": decoder.head_dim,
        "vocab_size": decoder.vocab_size,
        "rope.dimension_count": decoder.head_dim,
    }
    return {f"llama.{key}": value for key, value in values.items()}


def _filled(tokenizer: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """As many tokens as the model has rows for, which llama.cpp insists on."""
    if TOKENS not in tokenizer:
        return dict(tokenizer)
    num_tokens = len(tokenizer[TOKENS])
    if num_tokens > vocab_size:
        raise InputError(
            f"tokenizer: it has {num_tokens} tokens, the model {vocab_size}; "
            "give the one that the model was trained with"
        )
    names = [f"[PAD{i}]" for i in range(num_tokens, vocab_size)]
    return {
        **tokenizer,
        TOKENS: [*tokenizer[TOKENS], *names],
        TOKEN_TYPES: [*tokenizer[TOKEN_TYPES], *[UNUSED] * len(names)],
    }


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _head(
    metadata: Mapping[str, Any],
    source: Source,
    kinds: Mapping[str, Kind],
    places: Mapping[str, Place],
) -> bytes:
    """Everything before the tensors; offsets in it are from its end."""
    # llama.cpp's own writer leaves out empty lists: they have no type.
    entries = [_string(key) + _value(value) for key, value in metadata.items() if value != []]
    head = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(kinds), len(entries)) + b"".join(entries)
    for name, kind in kinds.items():
        shape = source.tensors[name].shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", kind.number, places[name].offset)
    return head.ljust(_padded(len(head)), b"\0")


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + _string(value)
        case [str(), *_]:
            items = b"".join(map(_string, value))
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + items
        case [int(), *_]:
            items = np.array(value, "<i4").tobytes()
            return struct.pack("<IIQ", ARRAY, INT32, len(value)) + items
    raise TypeError(f"no type of GGUF's for {value!r}")


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content
