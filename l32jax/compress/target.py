"""The size that a model is pruned to."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from l32jax.config import DecoderConfig, LlamaConfig
from l32jax.errors import InputError

# What stays of a part, as JSON has it: indices by slot of the group pattern, or of the whole model.
Choice = Mapping[str, Any]

SIZES = ("num_groups", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "embed_dim")
SAME = ("vocab_size", "group_pattern", "norm_eps", "rope_theta")


def resized(config: LlamaConfig, **sizes: Any) -> LlamaConfig:
    return replace(config, decoder=replace(config.decoder, **sizes))


def require_reachable(source: LlamaConfig, target: LlamaConfig) -> None:
    """InputError unless the target is the source with less of something."""
    before, after = source.decoder, target.decoder
    if source.loras:
        raise InputError(
            "model to prune: it has LoRA; merge that first, as `l32jax convert` does, and prune "
            "what it writes"
        )
    if source.vision != target.vision:
        raise InputError(
            "target of pruning: its image encoder is not the model's, which stays as it is; prune "
            "to a custom size"
        )
    for name in SAME:
        if getattr(before, name) != getattr(after, name):
            raise InputError(
                f"{name}={getattr(after, name)} of the target: the model has "
                f"{getattr(before, name)}, which pruning does not change; choose another target"
            )
    for name in SIZES:
        if getattr(after, name) > getattr(before, name):
            raise InputError(
                f"{name}={getattr(after, name)} of the target: the model has only "
                f"{getattr(before, name)}; choose a smaller target, or a larger model"
            )
    _require_heads(before, after)
    if before.tied_embedding and not after.tied_embedding:
        raise InputError(
            "tied_embedding=False of the target: the model has one table for both ends; prune to a "
            "custom size"
        )


def _require_heads(before: DecoderConfig, after: DecoderConfig) -> None:
    if before.head_dim % after.head_dim:
        raise InputError(
            f"head_dim={after.head_dim} of the target: the rotary frequencies of heads of "
            f"{before.head_dim} hold those of its divisors only; choose one of them"
        )
    shared = before.num_heads // before.num_kv_heads
    if after.num_heads // after.num_kv_heads > shared:
        raise InputError(
            f"num_heads={after.num_heads} of the target with num_kv_heads={after.num_kv_heads}: in "
            f"the model a key/value head serves {shared} heads; choose fewer heads"
        )


def turning(config: LlamaConfig, target: LlamaConfig) -> LlamaConfig:
    """The config with what of the target is no weight: how positions turn, and how far they go."""
    after = target.decoder
    decoder = replace(
        config.decoder, rope_scaling=after.rope_scaling, max_context=after.max_context
    )
    return replace(config, decoder=decoder, compat=target.compat)
