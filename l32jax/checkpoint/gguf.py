"""GGUF files of Llama text models (llama.cpp): read, unpacked as rows are asked for."""

import os

import numpy as np

from l32jax.checkpoint import gguf_file
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.sources import Source, Tensor
from l32jax.checkpoint.engine.tables import (
    HEADS_IN,
    HEADS_OUT,
    ROTARY_PAIRS,
    Part,
    Table,
    addresses,
    ours,
    placed,
)
from l32jax.checkpoint.fields import MAX_LAYERS, Fields
from l32jax.checkpoint.own_config import located
from l32jax.config import DecoderConfig, LlamaConfig, RopeScaling
from l32jax.config_text import short
from l32jax.errors import InputError
from l32jax.model.llama import shapes_of
from l32jax.model.rope import frequencies

# llama.cpp's converter stores no scaling parameters, but the divisor of each rotary frequency.
ROPE_DIVISORS = "rope_freqs.weight"
NO_VISION = (
    "llama.cpp has no layout for Llama 3.2 Vision in GGUF; use the format of Hugging Face (hf)"
)
ELSEWHERE = {
    "mllama": f"which only Ollama reads; {NO_VISION}",
    "clip": f"the image encoder of another family; {NO_VISION}",
}

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
        home = f"decoder/groups/blocks/{address.slot}/"
        parts += placed(BLOCK, home, f"blk.{address.layer}.", address.group)
    return parts


def read_config(path: str | os.PathLike) -> LlamaConfig:
    """The text model that a file's metadata describes.

    InputError if the file is damaged, if it holds anything but a Llama, or if a key says what this
    package does not implement.
    """
    file = _open(path)
    prefix = "llama."
    # No key that is read here has an array: of one, its begin is enough for the refusal.
    values = {
        key.removeprefix(prefix): value[:8].tolist() if isinstance(value, np.ndarray) else value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    fields = Fields(values, str(path))
    with located(str(path)):
        config = LlamaConfig(decoder=_decoder(fields, file))
    fields.close()
    return config


def open_file(path: str | os.PathLike, config: LlamaConfig) -> Slices:
    """The file's weights: F32, F16 and BF16 as they are, all others dequantised to float32.

    InputError if the file is damaged, or a tensor is missing, too many or of another shape.
    """
    file = _open(path)
    decoder = config.decoder
    if _rope_scaling(file, decoder.head_dim, decoder.rope_theta) != decoder.rope_scaling:
        raise InputError(
            f"tensor {ROPE_DIVISORS!r} in {path}: its rotary scaling is not rope_scaling="
            f"{decoder.rope_scaling}; load with the config that read_config gives"
        )
    tensors = {
        name: Tensor(tensor.shape, tensor.kind.dtype) for name, tensor in file.tensors.items()
    }
    source = Source(str(path), tensors, file.read, file.mapped.release)
    return ours(table(config), source, shapes_of(config), ignore={ROPE_DIVISORS})


def rope_divisors(decoder: DecoderConfig) -> np.ndarray | None:
    """What llama.cpp divides the rotary frequencies by: float32 [head_dim / 2], None for nothing.

    1 up to 1 / high_freq_factor of the original context, and the scaling's factor in the end.
    """
    if decoder.rope_scaling is None:
        return None
    size, theta = decoder.head_dim, decoder.rope_theta
    plain = frequencies(size, theta=theta, scaling=None).astype(np.float64)
    scaled = frequencies(size, theta=theta, scaling=decoder.rope_scaling)
    return (plain / scaled).astype(np.float32)


def _open(path: str | os.PathLike) -> gguf_file.File:
    """InputError unless it is a whole text model of Llama's."""
    file = gguf_file.read(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture != "llama":
        why = ELSEWHERE.get(str(architecture), "expected 'llama'; only Llama text models are read")
        raise InputError(f"'general.architecture' in {path}: it is {short(architecture)}, {why}")
    parts = file.metadata.get("split.count", 0)
    if type(parts) is not int or parts > 1:
        raise InputError(
            f"'split.count' in {path}: it is one of {short(parts)} files; "
            "join them with llama.cpp's `llama-gguf-split --merge` first"
        )
    return file


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
    plain = frequencies(head_dim, theta=theta, scaling=None)
    if file.tensors[ROPE_DIVISORS].shape == plain.shape:
        divisors = file.read(ROPE_DIVISORS, slice(None))
        if 1 <= divisors[-1] < 1e6:
            # Six digits: the division that made it was rounded in the seventh.
            scaling = RopeScaling(factor=float(f"{divisors[-1]:.6g}"))
            scaled = frequencies(head_dim, theta=theta, scaling=scaling)
            if np.allclose(scaled * divisors, plain, rtol=1e-5, atol=0):
                return scaling
    raise InputError(
        f"tensor {ROPE_DIVISORS!r} in {file.path}: it does not divide the {head_dim // 2} rotary "
        "frequencies as Llama 3.1 and 3.2 do; no other scaling is implemented"
    )
