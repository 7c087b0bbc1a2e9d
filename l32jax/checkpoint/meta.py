"""Meta's own checkpoints (`consolidated.*.pth`, llama-models): the names of their tensors."""

from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import (
    HEADS_IN,
    HEADS_OUT,
    ROTARY_PAIRS,
    SCALAR,
    Layout,
    Part,
    Table,
    addresses,
    ours,
    placed,
)
from l32jax.config import LlamaConfig
from l32jax.model.llama import shapes_of

# [c c d] as [4, 4, 1, 1280]: Meta's tables have an axis over the tokens of a tile.
TILE = Layout(lambda shape: (*shape[:2], 1, shape[2]))

DECODER_BLOCK = (
    Part("attention_norm/scale", "attention_norm.weight"),
    Part("attention/value/weight", "attention.wv.weight", HEADS_OUT),
    Part("attention/out/weight", "attention.wo.weight", HEADS_IN),
    Part("mlp_norm/scale", "ffn_norm.weight"),
    Part("mlp/gate/weight", "feed_forward.w1.weight"),
    Part("mlp/up/weight", "feed_forward.w3.weight"),
    Part("mlp/down/weight", "feed_forward.w2.weight"),
)
SELF_BLOCK = (
    Part("attention/query/weight", "attention.wq.weight", ROTARY_PAIRS),
    Part("attention/key/weight", "attention.wk.weight", ROTARY_PAIRS),
    *DECODER_BLOCK,
)
CROSS_BLOCK = (
    Part("attention/query/weight", "attention.wq.weight", HEADS_OUT),
    Part("attention/key/weight", "attention.wk.weight", HEADS_OUT),
    Part("attention/query_norm/scale", "attention.q_norm.weight"),
    Part("attention/key_norm/scale", "attention.k_norm.weight"),
    Part("attention_gate", "gate_attn", SCALAR),
    Part("mlp_gate", "gate_ffwd", SCALAR),
    *DECODER_BLOCK,
)
BLOCKS = {"self": ("layers", SELF_BLOCK), "cross": ("cross_attention_layers", CROSS_BLOCK)}
VISION_BLOCK = (
    Part("attention_norm/scale", "ln_1.weight"),
    Part("attention_norm/bias", "ln_1.bias"),
    Part("attention/query/weight", "attn.wq.weight", HEADS_OUT),
    Part("attention/key/weight", "attn.wk.weight", HEADS_OUT),
    Part("attention/value/weight", "attn.wv.weight", HEADS_OUT),
    Part("attention/out/weight", "attn.wo.weight", HEADS_IN),
    Part("mlp_norm/scale", "ln_2.weight"),
    Part("mlp_norm/bias", "ln_2.bias"),
    Part("mlp/up/weight", "mlp.c_fc.weight"),
    Part("mlp/up/bias", "mlp.c_fc.bias"),
    Part("mlp/down/weight", "mlp.c_proj.weight"),
    Part("mlp/down/bias", "mlp.c_proj.bias"),
)
GATES = (Part("attention_gate", "gate_attn", SCALAR), Part("mlp_gate", "gate_ffn", SCALAR))
ENCODER = (
    Part("patch_embedding/weight", "conv1._linear.weight"),
    Part("class_embedding", "class_embedding"),
    Part("position/embedding", "positional_embedding"),
    Part("position/tile_embedding", "gated_positional_embedding"),
    Part("position/gate", "gated_positional_embedding_gate", SCALAR),
    Part("pre_tile/embedding", "pre_tile_pos_embed.embedding", TILE),
    Part("pre_tile/gate", "pre_tile_pos_embed.gate", SCALAR),
    Part("post_tile/embedding", "post_tile_pos_embed.embedding", TILE),
    Part("post_tile/gate", "post_tile_pos_embed.gate", SCALAR),
    Part("pre_norm/scale", "ln_pre.weight"),
    Part("pre_norm/bias", "ln_pre.bias"),
    Part("post_norm/scale", "ln_post.weight"),
    Part("post_norm/bias", "ln_post.bias"),
)
PROJECTOR = (Part("weight", "weight"), Part("bias", "bias"))
ROTARY = "rope.freqs"  # a table that some checkpoints have, and nobody needs


def table(config: LlamaConfig) -> Table:
    """Our parameters under the names that Meta's checkpoint of this model has."""
    decoder, vision = config.decoder, config.vision
    text = "" if vision is None else "text_model."
    parts = [
        Part("decoder/embedding/weight", f"{text}tok_embeddings.weight"),
        Part("decoder/final_norm/scale", f"{text}norm.weight"),
    ]
    if not decoder.tied_embedding:
        parts.append(Part("decoder/head/weight", head(config)))
    for _, kind, ordinal, group, slot in addresses(decoder):
        name, rules = BLOCKS[kind]
        home = f"decoder/groups/blocks/{slot}/"
        parts += placed(rules, home, f"{text}{name}.{ordinal}.", group)
    if vision is None:
        return parts
    parts.append(Part("decoder/image_embedding/weight", f"{text}learnable_embedding.weight"))
    encoder = "vision_model.vision_encoder."
    parts += placed(ENCODER, "vision/", encoder)
    for layer in range(vision.num_local_layers):
        block = f"{encoder}transformer.resblocks.{layer}."
        parts += placed(VISION_BLOCK, "vision/local_blocks/", block, layer)
    for layer in range(vision.num_global_layers):
        block = f"{encoder}global_transformer.resblocks.{layer}."
        parts += placed(VISION_BLOCK + GATES, "vision/global_blocks/", block, layer)
    return parts + placed(PROJECTOR, "projector/", "vision_model.vision_projection.")


def head(config: LlamaConfig) -> str:
    """The name of the output head's weight."""
    return "output.weight" if config.vision is None else "text_model.output.weight"


def open_tensors(source: Source, config: LlamaConfig) -> Slices:
    """Our parameters, from whole (joined) tensors under Meta's names.

    InputError if a tensor is missing, too many or of another shape.
    """
    text = "" if config.vision is None else "text_model."
    tied = config.decoder.tied_embedding
    return ours(
        table(config),
        source,
        shapes_of(config),
        ignore={f"{text}{ROTARY}"},
        repeated={head(config): f"{text}tok_embeddings.weight"} if tied else None,
    )
