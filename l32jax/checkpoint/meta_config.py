"""Meta's params.json to our config and back; what it does not know, it refuses."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from l32jax.checkpoint.engine.sources import Tensor
from l32jax.checkpoint.engine.tables import shortest_group
from l32jax.checkpoint.fields import MAX_LAYERS, MAX_SIZE, Fields
from l32jax.config import BlockKind, DecoderConfig, LlamaConfig, RopeScaling, VisionConfig
from l32jax.errors import InputError

PARAMS = "params.json"
ENCODER = "vision_model.vision_encoder."
# What llama-models takes where the file is silent.
DEFAULTS = {
    "multiple_of": 256,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "use_scaled_rope": False,
    "vision_max_num_chunks": 4,
}
# What llama-models has no key for, because its code has the number. We write these keys, which it
# ignores, where a model differs; `rope_scaling_factor` and the first here are Llama 4's.
ROPE: dict[str, Any] = {
    "rope_high_freq_factor": 4.0,
    "rope_low_freq_factor": 1.0,
    "rope_original_context": 8192,
}
VISION: dict[str, Any] = {
    "vision_n_heads": 16,
    "vision_return_intermediate": [3, 7, 15, 23, 30],
    "vision_norm_eps": 1e-5,
}
# The factor of 3.2's 1B and 3B, by dim and n_layers as their file is silent too, and of all others.
FACTORS, USUAL_FACTOR = {(2048, 16): 32.0, (3072, 28): 32.0}, 8.0
SCALED_CONTEXT, PLAIN_CONTEXT = 131_072, 8192


def from_json(
    fields: Fields, tensors: Mapping[str, Tensor], *, tied: bool, quantised: bool
) -> LlamaConfig:
    """The model of a params.json; what it leaves open is seen from the shapes of its tensors.

    InputError names the first key whose value, or whose presence, this package does not implement.
    """
    own = {name: value for name, value in fields.values.items() if value is not None}
    scaled = own.get("use_scaled_rope") is True and not quantised
    context = {"max_context": SCALED_CONTEXT if scaled else PLAIN_CONTEXT}
    fields.values = DEFAULTS | ROPE | VISION | context | own
    for name in ("max_batch_size", "max_seq_len"):
        fields.get(name)  # of a run
    has_vision = fields.get("vision_chunk_size") not in (None, -1)
    config = LlamaConfig(
        decoder=_decoder(fields, tensors, tied=tied, has_vision=has_vision),
        vision=_encoder(fields, tensors) if has_vision else None,
    )
    unused = (*ROPE, *VISION, "rope_scaling_factor", "vision_max_num_chunks")
    for name in (*unused, "vision_num_cross_attention_layers"):
        fields.get(name)
    fields.close()
    return config


def _decoder(
    fields: Fields, tensors: Mapping[str, Tensor], *, tied: bool, has_vision: bool
) -> DecoderConfig:
    width, heads = fields.size("dim"), fields.size("n_heads")
    if width % heads:
        fields.refuse("dim", f"a multiple of n_heads={heads}")
    layers = fields.size("n_layers", at_most=MAX_LAYERS)
    kinds = _kinds(layers, _num_cross(fields, layers) if has_vision else 0)
    pattern = shortest_group(kinds)
    if fields.get("vocab_size") == -1:  # left to the tokenizer
        name = f"{'text_model.' if has_vision else ''}tok_embeddings.weight"
        fields.values["vocab_size"] = _shape(tensors, name, 2)[0]
    fields.only("use_scaled_rope", True, False)
    return DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=fields.size("n_kv_heads", default=heads),
        head_dim=width // heads,
        mlp_dim=_mlp_dim(fields, width),
        num_groups=len(kinds) // len(pattern),
        group_pattern=pattern,
        tied_embedding=tied,
        norm_eps=fields.number("norm_eps"),
        rope_theta=fields.number("rope_theta"),
        rope_scaling=_scaling(fields, (width, layers)) if fields.get("use_scaled_rope") else None,
        max_context=fields.size("max_context"),
    )


def _mlp_dim(fields: Fields, width: int) -> int:
    """Two thirds of four times the width, times a factor, rounded up to a multiple."""
    multiple = fields.size("multiple_of")
    size = int(2 * 4 * width / 3)
    if fields.get("ffn_dim_multiplier") is not None:
        size = int(fields.number("ffn_dim_multiplier") * size)
    size = multiple * -(-size // multiple)
    if not 1 <= size <= MAX_SIZE:
        fields.refuse("ffn_dim_multiplier", f"one that gives an MLP of at most {MAX_SIZE}")
    return size


def _scaling(fields: Fields, shape: tuple[int, int]) -> RopeScaling:
    fields.values.setdefault("rope_scaling_factor", FACTORS.get(shape, USUAL_FACTOR))
    return RopeScaling(
        factor=fields.number("rope_scaling_factor"),
        low_freq_factor=fields.number("rope_low_freq_factor"),
        high_freq_factor=fields.number("rope_high_freq_factor"),
        original_context=fields.size("rope_original_context"),
    )


def _num_cross(fields: Fields, layers: int) -> int:
    """Of cross-attention blocks; older files have the number inside of `vision_model`."""
    name, old = "vision_num_cross_attention_layers", "vision_model"
    if name not in fields.values and fields.get(old) is not None:
        parts = Fields(fields.get(old), f"{fields.where}, {old}")
        adapter = Fields(parts.get("cross_attention_adapter"), f"{fields.where}, adapter")
        fields.values[name] = adapter.get("num_layers")
        adapter.close()
        parts.close()
    return fields.size(name, at_most=layers)


def _kinds(num_self: int, num_cross: int) -> tuple[BlockKind, ...]:
    """The blocks in the order in which they run: cross-attention before every so-many-th layer."""
    every = -(-num_self // num_cross) if num_cross else 1
    before = set(range(num_self)[::-every][:num_cross])
    kinds: list[BlockKind] = []
    for layer in range(num_self):
        if layer in before:
            kinds.append("cross")
        kinds.append("self")
    return tuple(kinds)


def _encoder(fields: Fields, tensors: Mapping[str, Tensor]) -> VisionConfig:
    patches = _shape(tensors, f"{ENCODER}conv1._linear.weight", 2)[1]
    mlp = _shape(tensors, f"{ENCODER}transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    return VisionConfig(
        image_size=fields.size("vision_chunk_size"),
        embed_dim=_shape(tensors, f"{ENCODER}class_embedding", 1)[0],
        num_heads=fields.size("vision_n_heads"),
        mlp_dim=mlp,
        num_local_layers=_count(tensors, f"{ENCODER}transformer.resblocks."),
        num_global_layers=_count(tensors, f"{ENCODER}global_transformer.resblocks."),
        taps=fields.indices("vision_return_intermediate"),
        patch_size=math.isqrt(patches // 3),
        max_tiles=fields.size("vision_max_num_chunks"),
        norm_eps=fields.number("vision_norm_eps"),
    )


def _shape(tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) != rank:
        raise InputError(
            f"tensor {name!r}: a checkpoint with this {PARAMS} has it, with {rank} dimensions; "
            "download the two again"
        )
    return tensors[name].shape


def _count(tensors: Mapping[str, Tensor], blocks: str) -> int:
    """How many blocks there are; that they are numbered rightly is seen when they are read."""
    return sum(name.startswith(blocks) and name.endswith(".ln_1.weight") for name in tensors)


def to_json(config: LlamaConfig) -> dict[str, Any]:
    """The content of params.json. InputError for a model that llama-models cannot express."""
    decoder = config.decoder
    if decoder.head_dim * decoder.num_heads != decoder.embed_dim:
        raise InputError(
            f"head_dim={decoder.head_dim}: Meta's format has no such setting, its heads share "
            f"embed_dim={decoder.embed_dim} evenly; choose another format"
        )
    content = {
        "dim": decoder.embed_dim,
        "n_layers": decoder.count("self"),
        "n_heads": decoder.num_heads,
        "n_kv_heads": decoder.num_kv_heads,
        "vocab_size": decoder.vocab_size,
        **_mlp_json(decoder),
        "norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "use_scaled_rope": decoder.rope_scaling is not None,
    }
    if config.vision is not None:
        content |= _vision_json(config.vision, decoder)
    return content | dict(_exceptions(config))


def _mlp_json(decoder: DecoderConfig) -> dict[str, Any]:
    """A factor and a multiple that give this size, whatever it is: itself, rounded up to itself."""
    usual = int(2 * 4 * decoder.embed_dim / 3)
    factor = min(1.0, decoder.mlp_dim / usual)
    return {"ffn_dim_multiplier": factor, "multiple_of": decoder.mlp_dim}


def _vision_json(vision: VisionConfig, decoder: DecoderConfig) -> dict[str, Any]:
    num_self, num_cross = decoder.count("self"), decoder.count("cross")
    if decoder.group_pattern * decoder.num_groups != _kinds(num_self, num_cross):
        raise InputError(
            f"group_pattern={decoder.group_pattern}: Meta's format has other places for "
            f"{num_cross} cross-attention blocks among {num_self}; choose another format"
        )
    return {
        "vision_chunk_size": vision.image_size,
        "vision_max_num_chunks": vision.max_tiles,
        "vision_num_cross_attention_layers": num_cross,
    }


def _exceptions(config: LlamaConfig) -> Iterator[tuple[str, Any]]:
    """The keys of ours, where the model is not what `from_json` takes it for without them."""
    decoder, vision, scaling = config.decoder, config.vision, config.decoder.rope_scaling
    usual: dict[str, Any] = {"max_context": PLAIN_CONTEXT if scaling is None else SCALED_CONTEXT}
    actual: dict[str, Any] = {"max_context": decoder.max_context}
    if scaling is not None:
        shape = (decoder.embed_dim, decoder.count("self"))
        usual |= ROPE | {"rope_scaling_factor": FACTORS.get(shape, USUAL_FACTOR)}
        actual |= {
            "rope_scaling_factor": scaling.factor,
            "rope_low_freq_factor": scaling.low_freq_factor,
            "rope_high_freq_factor": scaling.high_freq_factor,
            "rope_original_context": scaling.original_context,
        }
    if vision is not None:
        usual |= VISION
        actual |= {
            "vision_n_heads": vision.num_heads,
            "vision_return_intermediate": list(vision.taps),
            "vision_norm_eps": vision.norm_eps,
        }
    yield from ((name, value) for name, value in actual.items() if value != usual[name])
