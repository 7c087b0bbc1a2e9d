"""GGUF files of Llama text models (llama.cpp): read, dequantised tensor by tensor."""

import importlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from l32jax.checkpoint.fields import MAX_LAYERS, Fields
from l32jax.checkpoint.tables import (
    HEADS_IN,
    HEADS_OUT,
    ROTARY_PAIRS,
    Part,
    Source,
    Table,
    addresses,
    placed,
)
from l32jax.checkpoint.tables import load as load_table
from l32jax.config import DecoderConfig, LlamaConfig, RopeScaling
from l32jax.errors import InputError
from l32jax.model.parameters import Params
from l32jax.model.rope import frequencies

# llama.cpp's converter stores no scaling parameters, but the divisor of each rotary frequency.
ROPE_DIVISORS = "rope_freqs.weight"
# The tokens, scores and merges of a vocabulary of 256k, twice: the reader keeps an object for each.
MAX_ARRAY_ITEMS = 2**21
READER_ERRORS = (IndexError, KeyError, OSError, OverflowError, TypeError, ValueError)

BLOCK = (
    Part("attention_norm/scale", "attn_norm.weight"),
    Part("attention/query/weight", "attn_q.weight", ROTARY_PAIRS),
    Part("attention/key/weight", "attn_k.weight", ROTARY_PAIRS),
    Part("attention/value/weight", "attn_v.weight", HEADS_OUT),
    Part("attention/out/weight", "attn_output.weight", HEADS_IN),
    Part("mlp_norm/scale", "ffn_norm.weight"),
    Part("mlp/gate/weight", "ffn_gate.weight"),
    Part("mlp/up/weight", "ffn_up.weight"),
    Part("mlp/down/weight", "ffn_down.weight"),
)


def table(config: LlamaConfig) -> Table:
    """Our parameters of a text model under llama.cpp's names."""
    parts = [
        Part("decoder/embedding/weight", "token_embd.weight"),
        Part("decoder/final_norm/scale", "output_norm.weight"),
    ]
    if not config.decoder.tied_embedding:
        parts.append(Part("decoder/head/weight", "output.weight"))
    for address in addresses(config.decoder):
        ours = f"decoder/groups/blocks/{address.slot}/"
        parts += placed(BLOCK, ours, f"blk.{address.layer}.", address.group)
    return parts


def read_config(path: str | os.PathLike) -> LlamaConfig:
    """The text model that a file's metadata describes.

    InputError if the file is damaged, if it holds anything but a Llama, or if a key says what this
    package does not implement.
    """
    return _config(_open(path), Path(path))


def load(path: str | os.PathLike, config: LlamaConfig, targets: Params) -> Params:
    """The file's weights, dequantised to the dtypes of `targets`, and placed as it says.

    InputError if the file is damaged, or a tensor is missing, too many or of another shape.
    """
    reader = _open(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    source = Source(str(path), shapes, lambda name: _dequantised(tensors[name], path))
    decoder = config.decoder
    if _rope_scaling(reader, decoder.head_dim, decoder.rope_theta, path) != decoder.rope_scaling:
        raise InputError(
            f"tensor {ROPE_DIVISORS!r} in {path}: its rotary scaling is not rope_scaling="
            f"{decoder.rope_scaling}; load with the config that read_config gives"
        )
    return load_table(table(config), source, targets, ignore={ROPE_DIVISORS})


def _library() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise InputError("GGUF files need the package 'gguf'; pip install 'l32jax[gguf]'") from None


def _open(path: str | os.PathLike) -> Any:
    """The library's reader of a file whose header is sound."""
    library = _library()
    if not Path(path).is_file():
        raise InputError(f"GGUF file {path}: there is no such file")
    try:
        reader = _bounded_reader(library)(path)
    except READER_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"GGUF file {path}: damaged ({reason}); download it again") from None
    if reader.endianess != library.GGUFEndian.LITTLE:
        raise InputError(f"GGUF file {path}: its numbers are big-endian; convert it")
    return reader


def _bounded_reader(library: ModuleType) -> Callable[[Any], Any]:
    """The library's reader, which believes any length in a damaged header, made to check them."""

    class Reader(library.GGUFReader):
        items_left = MAX_ARRAY_ITEMS

        def _get(self, offset, dtype, count=1, override_order=None):
            size = np.dtype(dtype).itemsize * int(count)
            if not 0 <= offset <= offset + size <= len(self.data):
                raise ValueError("it ends early")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type == library.GGUFValueType.ARRAY:
                (kind,) = self._get(orig_offs, np.uint32)
                (length,) = self._get(orig_offs + 4, np.uint64)
                self.items_left -= int(length)
                if kind == library.GGUFValueType.ARRAY or self.items_left < 0:
                    raise ValueError("an array of its metadata is nested or too long")
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _dequantised(tensor: Any, path: str | os.PathLike) -> np.ndarray:
    quants = importlib.import_module("gguf.quants")
    try:
        return quants.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise InputError(
            f"tensor {tensor.name!r} in {path}: cannot be dequantised ({error}); "
            "use a file of another quantisation"
        ) from None


def _config(reader: Any, path: Path) -> LlamaConfig:
    everything = _contents(reader, path)
    if everything.get("general.architecture") != "llama":
        raise InputError(
            f"'general.architecture' in {path}: it is {everything.get('general.architecture')!r}, "
            "expected 'llama'; only Llama text models are read from GGUF"
        )
    values = {k.removeprefix("llama."): v for k, v in everything.items() if k.startswith("llama.")}
    fields = Fields(values, str(path))
    shapes = {tensor.name: _shape(tensor) for tensor in reader.tensors}
    vocab_size = fields.size(
        "vocab_size", default=next(iter(shapes.get("token_embd.weight", ())), 0)
    )
    width, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", default=width // heads)
    fields.only("attention.value_length", head_dim)
    fields.only("rope.dimension_count", head_dim)
    fields.only("rope.scaling.type", "none")
    fields.only("expert_count", 0)
    fields.only("expert_used_count", 0)
    theta = _shortest(fields.number("rope.freq_base"))
    config = LlamaConfig(
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            embed_dim=width,
            num_heads=heads,
            num_kv_heads=fields.size("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            mlp_dim=fields.size("feed_forward_length"),
            num_groups=fields.size("block_count", at_most=MAX_LAYERS),
            tied_embedding="output.weight" not in shapes,
            norm_eps=_shortest(fields.number("attention.layer_norm_rms_epsilon")),
            rope_theta=theta,
            rope_scaling=_rope_scaling(reader, head_dim, theta, path),
            max_context=fields.size("context_length"),
        )
    )
    fields.close()
    return config


def _contents(reader: Any, path: Path) -> dict[str, Any]:
    """The metadata but for what belongs to the tokenizer."""
    try:
        return {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.startswith("llama.") or name == "general.architecture"
        }
    except READER_ERRORS as error:
        raise InputError(
            f"GGUF file {path}: damaged metadata ({error}); download it again"
        ) from None


def _shortest(value: float) -> float:
    """1e-05 of 9.999999747378752e-06: what was written, before it was rounded to float32."""
    return float(str(np.float32(value)))


def _rope_scaling(
    reader: Any, head_dim: int, theta: float, path: str | os.PathLike
) -> RopeScaling | None:
    """Llama 3's scaling, by the divisor of the lowest frequency, if it explains all the others."""
    tensor = next((t for t in reader.tensors if t.name == ROPE_DIVISORS), None)
    if tensor is None:
        return None
    divisors = _dequantised(tensor, path).reshape(-1)
    plain = frequencies(head_dim, theta=theta, scaling=None)
    if divisors.shape == plain.shape and math.isfinite(divisors[-1]) and divisors[-1] > 0:
        scaling = RopeScaling(factor=_shortest(divisors[-1]))
        scaled = frequencies(head_dim, theta=theta, scaling=scaling)
        if np.allclose(plain / divisors, scaled, rtol=1e-5, atol=0):
            return scaling
    raise InputError(
        f"tensor {ROPE_DIVISORS!r} in {path}: it does not divide the {head_dim // 2} rotary "
        "frequencies as Llama 3.1 and 3.2 do, which is the only scaling that is implemented"
    )
