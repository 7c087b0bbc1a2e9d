"""GGUF files of Llama text models (llama.cpp): read, dequantised tensor by tensor."""

import importlib
import os

import numpy as np

from l32jax.checkpoint import gguf_file
from l32jax.checkpoint.fields import MAX_LAYERS, Fields, short
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
    file = gguf_file.read(path)
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(
            f"'general.architecture' in {path}: it is {short(architecture)}, expected 'llama'; "
            "only Llama text models are read from GGUF"
        )
    prefix = "llama."
    values = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    fields = Fields(values, str(path))
    config = LlamaConfig(decoder=_decoder(fields, file))
    fields.close()
    return config


def load(path: str | os.PathLike, config: LlamaConfig, targets: Params) -> Params:
    """The file's weights, dequantised to the dtypes of `targets`, and placed as it says.

    InputError if the file is damaged, or a tensor is missing, too many or of another shape.
    """
    file = gguf_file.read(path)
    decoder = config.decoder
    if _rope_scaling(file, decoder.head_dim, decoder.rope_theta) != decoder.rope_scaling:
        raise InputError(
            f"tensor {ROPE_DIVISORS!r} in {path}: its rotary scaling is not rope_scaling="
            f"{decoder.rope_scaling}; load with the config that read_config gives"
        )
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    source = Source(str(path), shapes, lambda name: _dequantised(file, name))
    return load_table(table(config), source, targets, ignore={ROPE_DIVISORS})


def _decoder(fields: Fields, file: gguf_file.File) -> DecoderConfig:
    width, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", default=width // heads)
    fields.only("attention.value_length", head_dim)
    fields.only("rope.dimension_count", head_dim)
    fields.only("rope.scaling.type", "none")
    fields.only("expert_count", 0)
    fields.only("expert_used_count", 0)
    theta = _shortest(fields.number("rope.freq_base"))
    embedding = file.tensors.get("token_embd.weight")
    return DecoderConfig(
        vocab_size=fields.size("vocab_size", default=embedding and embedding.shape[0]),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=fields.size("attention.head_count_kv", default=heads),
        head_dim=head_dim,
        mlp_dim=fields.size("feed_forward_length"),
        num_groups=fields.size("block_count", at_most=MAX_LAYERS),
        tied_embedding="output.weight" not in file.tensors,
        norm_eps=_shortest(fields.number("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, head_dim, theta),
        max_context=fields.size("context_length"),
    )


def _shortest(value: float) -> float:
    """1e-05 of 9.999999747378752e-06: what was written, before it was rounded to float32."""
    return float(str(np.float32(value)))


def _rope_scaling(file: gguf_file.File, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama 3's scaling, by the divisor of the lowest frequency, if it explains all the others."""
    if ROPE_DIVISORS not in file.tensors:
        return None
    divisors = _dequantised(file, ROPE_DIVISORS)
    plain = frequencies(head_dim, theta=theta, scaling=None)
    if divisors.shape == plain.shape and 1 <= divisors[-1] < 1e6:
        scaling = RopeScaling(factor=_shortest(float(divisors[-1])))
        scaled = frequencies(head_dim, theta=theta, scaling=scaling)
        if np.allclose(scaled * divisors, plain, rtol=1e-5, atol=0):
            return scaling
    raise InputError(
        f"tensor {ROPE_DIVISORS!r} in {file.path}: it does not divide the {head_dim // 2} rotary "
        "frequencies as Llama 3.1 and 3.2 do; no other scaling is implemented"
    )


def _dequantised(file: gguf_file.File, name: str) -> np.ndarray:
    """A tensor as float32, by the package that knows all the quantisations."""
    try:
        quants = importlib.import_module("gguf.quants")
    except ImportError:
        raise InputError(
            f"weights in {file.path}: GGUF needs the package gguf; pip install 'l32jax[gguf]'"
        ) from None
    tensor = file.tensors[name]
    try:
        kind = quants.GGMLQuantizationType(tensor.kind)
        stored = file.bytes_of(name, quants.quant_shape_to_byte_shape(tensor.shape, kind))
        return quants.dequantize(stored, kind)
    except InputError:
        raise
    except (NotImplementedError, ValueError) as error:
        raise InputError(
            f"tensor {name!r} in {file.path}: cannot be dequantised ({error}); "
            "use a file of another quantisation"
        ) from None
