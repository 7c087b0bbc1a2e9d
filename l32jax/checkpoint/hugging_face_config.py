"""Hugging Face's config.json to our config and back; what it does not know, it refuses."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l32jax.checkpoint.engine.tables import shortest_group
from l32jax.checkpoint.fields import MAX_LAYERS, Fields, read_json
from l32jax.checkpoint.own_config import located
from l32jax.config import BlockKind, DecoderConfig, LlamaConfig, RopeScaling, VisionConfig
from l32jax.config_text import short
from l32jax.errors import InputError

CONFIG = "config.json"
ASPECT_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))

# What may stand in a config and changes nothing here: bookkeeping of transformers, how to generate
# (which releases before 5 copied into every part), what republishers of the weights add.
BOOKKEEPING = (
    "_attn_implementation_autoset _name_or_path add_cross_attention architectures bos_token_id "
    "chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id dtype "
    "eos_token_id finetuning_task id2label initializer_range is_decoder is_encoder_decoder "
    "label2id output_attentions output_hidden_states pad_token_id prefix problem_type "
    "pruned_heads return_dict sep_token_id task_specific_params tf_legacy_loss "
    "tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version "
    "use_bfloat16 use_cache"
)
GENERATION = (
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id "
    "forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values "
    "repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p"
)
REPUBLISHED = "unsloth_fixed unsloth_version"
HARMLESS = frozenset(f"{BOOKKEEPING} {GENERATION} {REPUBLISHED}".split())


class TokenIds(NamedTuple):
    """The tokenizer's ids that a config.json names; none of them if there is no tokenizer."""

    begin: int | None
    stop: tuple[int, ...]
    pad: int | None


def read_config(directory: str | Path) -> LlamaConfig:
    """The model that `config.json` of this directory describes, a text or a vision one.

    Reads what transformers 4.45 to 5 write for model_type "llama" and "mllama". InputError names
    the first key whose value, or whose presence, this package does not implement.
    """
    path = Path(directory) / CONFIG
    fields = Fields(read_json(path), str(path), HARMLESS)
    with located(str(path)):
        config = _model(fields)
    fields.close()
    return config


def _model(fields: Fields) -> LlamaConfig:
    kind = fields.get("model_type")
    if kind == "llama":
        fields.only("pretraining_tp", 1)
        fields.only("attention_bias", False)
        fields.only("attention_dropout", 0)
        fields.only("mlp_bias", False)
        return LlamaConfig(decoder=_decoder(fields, ("self",)))
    if kind == "mllama":
        return _vision_model(fields)
    raise InputError(
        f"'model_type' in {fields.where}: it is {short(kind)}, expected 'llama' or 'mllama'"
    )


def _vision_model(fields: Fields) -> LlamaConfig:
    text = Fields(fields.get("text_config"), f"{fields.where}, text_config", HARMLESS)
    vision = Fields(fields.get("vision_config"), f"{fields.where}, vision_config", HARMLESS)
    text.only("model_type", "mllama_text_model")
    text.only("dropout", 0)
    pattern = _pattern(text)
    decoder = _decoder(text, pattern)
    # transformers gives this model no choice in either, whatever its config says.
    text.only("head_dim", decoder.embed_dim // decoder.num_heads)
    text.only("tie_word_embeddings", False)
    fields.only("tie_word_embeddings", False)
    fields.only("image_token_index", decoder.vocab_size)
    config = LlamaConfig(decoder=decoder, vision=_encoder(vision))
    text.close()
    vision.close()
    return config


def _decoder(fields: Fields, pattern: tuple[BlockKind, ...]) -> DecoderConfig:
    fields.only("hidden_act", "silu")
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if width % heads:
        fields.refuse("hidden_size", f"a multiple of num_attention_heads={heads}")
    layers = fields.size("num_hidden_layers", at_most=MAX_LAYERS)
    theta, scaling = _rope(fields)
    fields.only("tie_word_embeddings", False, True)
    return DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", default=heads),
        head_dim=fields.size("head_dim", default=width // heads),
        mlp_dim=fields.size("intermediate_size"),
        num_groups=layers // len(pattern),
        group_pattern=pattern,
        tied_embedding=bool(fields.get("tie_word_embeddings")),
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        max_context=fields.size("max_position_embeddings"),
    )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """From `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (4)."""
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    values = next((given for given in (new, old) if given is not None), {})
    rope = Fields(values, f"{fields.where}, rope parameters")
    if new is None:
        rope.values = {"rope_theta": fields.get("rope_theta"), **rope.values}
    theta = rope.number("rope_theta")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope.only("type", kind)
    rope.only("rope_type", "default", "llama3")
    rope.only("type", "default", "llama3")
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_context=rope.size("original_max_position_embeddings"),
        )
    rope.close()
    return theta, scaling


def _pattern(fields: Fields) -> tuple[BlockKind, ...]:
    """The shortest group of blocks whose repetition puts cross-attention where the list says."""
    cross = fields.indices("cross_attention_layers")
    layers = fields.size("num_hidden_layers", at_most=MAX_LAYERS)
    if not cross or max(cross) >= layers:
        fields.refuse("cross_attention_layers", f"at least one layer below {layers}")
    return shortest_group(
        tuple("cross" if layer in set(cross) else "self" for layer in range(layers))
    )


def _encoder(fields: Fields) -> VisionConfig:
    fields.only("model_type", "mllama_vision_model")
    fields.only("hidden_act", "gelu")
    fields.only("num_channels", 3)
    fields.only("max_num_tiles", 4)
    fields.only("tie_word_embeddings", True, False)  # 4.45 wrote it here too; there are no words
    fields.only("supported_aspect_ratios", [list(ratio) for ratio in ASPECT_RATIOS])
    fields.only("attention_dropout", 0)
    fields.only("dropout", 0)
    heads = fields.size("attention_heads")
    fields.only("num_attention_heads", heads)
    config = VisionConfig(
        image_size=fields.square("image_size"),
        embed_dim=fields.size("hidden_size"),
        num_heads=heads,
        mlp_dim=fields.size("intermediate_size"),
        num_local_layers=fields.size("num_hidden_layers", at_most=MAX_LAYERS),
        num_global_layers=fields.size("num_global_layers", at_most=MAX_LAYERS),
        taps=fields.indices("intermediate_layers_indices"),
        patch_size=fields.square("patch_size"),
        norm_eps=fields.number("norm_eps"),
    )
    if config.embed_dim % heads:
        fields.refuse("hidden_size", f"a multiple of attention_heads={heads}")
    fields.only("vision_output_dim", config.feature_dim)
    return config


def to_json(config: LlamaConfig, ids: TokenIds, dtype: Any) -> dict[str, Any]:
    """The content of config.json, in the keys that transformers 4.45 to 5 read alike."""
    text = _text_json(config.decoder, ids)
    dtype = {"torch_dtype": np.dtype(dtype).name}
    if config.vision is None:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **text,
            "head_dim": config.decoder.head_dim,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": config.decoder.tied_embedding,
            **dtype,
        }
    decoder = config.decoder
    if decoder.head_dim * decoder.num_heads != decoder.embed_dim:
        raise InputError(
            f"head_dim={decoder.head_dim}: Hugging Face's vision model has no such setting, its "
            f"heads share embed_dim={decoder.embed_dim} evenly"
        )
    pattern = decoder.group_pattern * decoder.num_groups
    cross = [layer for layer, kind in enumerate(pattern) if kind == "cross"]
    text |= {"model_type": "mllama_text_model", "cross_attention_layers": cross}
    if ids.begin is None:
        del text["bos_token_id"]  # which transformers 5 lets no vision model set to null
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": decoder.vocab_size,
        "text_config": text | {"tie_word_embeddings": False} | dtype,
        "vision_config": _vision_json(config.vision) | dtype,
        "tie_word_embeddings": False,
        **dtype,
    }


def _text_json(decoder: DecoderConfig, ids: TokenIds) -> dict[str, Any]:
    scaling = decoder.rope_scaling
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.embed_dim,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "max_position_embeddings": decoder.max_context,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        **token_ids_json(ids),
    }


def token_ids_json(ids: TokenIds) -> dict[str, Any]:
    stop = list(ids.stop) if len(ids.stop) > 1 else next(iter(ids.stop), None)
    return {"bos_token_id": ids.begin, "eos_token_id": stop, "pad_token_id": ids.pad}


def _vision_json(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "mllama_vision_model",
        "hidden_size": vision.embed_dim,
        "hidden_act": "gelu",
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": vision.num_local_layers,
        "num_global_layers": vision.num_global_layers,
        "attention_heads": vision.num_heads,
        "intermediate_layers_indices": list(vision.taps),
        "vision_output_dim": vision.feature_dim,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "norm_eps": vision.norm_eps,
        "max_num_tiles": vision.max_tiles,
        "supported_aspect_ratios": [list(ratio) for ratio in ASPECT_RATIOS],
    }
