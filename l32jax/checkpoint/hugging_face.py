"""Hugging Face's checkpoints of Llama and Llama Vision ("mllama"): names, layouts, directories."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from l32jax.checkpoint import tensors
from l32jax.checkpoint.engine.flat_files import FlatFiles
from l32jax.checkpoint.engine.manifest import MANIFEST
from l32jax.checkpoint.engine.slices import Shape, Slices
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import (
    HEADS_IN,
    HEADS_OUT,
    SCALAR,
    Layout,
    Part,
    Table,
    addresses,
    ours,
    placed,
    theirs,
)
from l32jax.checkpoint.hugging_face_config import (
    CONFIG,
    TokenIds,
    to_json,
    token_ids_json,
)
from l32jax.checkpoint.hugging_face_tiles import GRID
from l32jax.config import LlamaConfig
from l32jax.errors import InputError
from l32jax.model.llama import shapes_of

GENERATION_CONFIG = "generation_config.json"
MAX_FILE_BYTES = 5_000_000_000


def _patches(shape: Shape) -> Shape:
    """[d 3*size*size] as a convolution's [d, 3, size, size]."""
    size = math.isqrt(shape[1] // 3)
    return (shape[0], 3, size, size)


PATCHES = Layout(_patches)

DECODER_BLOCK = (
    Part("attention_norm/scale", "input_layernorm.weight"),
    Part("mlp_norm/scale", "post_attention_layernorm.weight"),
    Part("mlp/gate/weight", "mlp.gate_proj.weight"),
    Part("mlp/up/weight", "mlp.up_proj.weight"),
    Part("mlp/down/weight", "mlp.down_proj.weight"),
)
ATTENTION = (
    Part("query/weight", "q_proj.weight", HEADS_OUT),
    Part("key/weight", "k_proj.weight", HEADS_OUT),
    Part("value/weight", "v_proj.weight", HEADS_OUT),
    Part("out/weight", "o_proj.weight", HEADS_IN),
)
BLOCKS = {
    "self": (*placed(ATTENTION, "attention/", "self_attn."), *DECODER_BLOCK),
    "cross": (
        *placed(ATTENTION, "attention/", "cross_attn."),
        Part("attention/query_norm/scale", "cross_attn.q_norm.weight"),
        Part("attention/key_norm/scale", "cross_attn.k_norm.weight"),
        Part("attention_gate", "cross_attn_attn_gate", SCALAR),
        Part("mlp_gate", "cross_attn_mlp_gate", SCALAR),
        *DECODER_BLOCK,
    ),
}
VISION_BLOCK = (
    *placed(ATTENTION, "attention/", "self_attn."),
    Part("attention_norm/scale", "input_layernorm.weight"),
    Part("attention_norm/bias", "input_layernorm.bias"),
    Part("mlp_norm/scale", "post_attention_layernorm.weight"),
    Part("mlp_norm/bias", "post_attention_layernorm.bias"),
    Part("mlp/up/weight", "mlp.fc1.weight"),
    Part("mlp/up/bias", "mlp.fc1.bias"),
    Part("mlp/down/weight", "mlp.fc2.weight"),
    Part("mlp/down/bias", "mlp.fc2.bias"),
)
GATES = (Part("attention_gate", "gate_attn", SCALAR), Part("mlp_gate", "gate_ffn", SCALAR))
ENCODER = (
    Part("patch_embedding/weight", "patch_embedding.weight", PATCHES),
    Part("class_embedding", "class_embedding"),
    Part("position/embedding", "gated_positional_embedding.embedding"),
    Part("position/tile_embedding", "gated_positional_embedding.tile_embedding.weight", GRID),
    Part("position/gate", "gated_positional_embedding.gate", SCALAR),
    Part("pre_tile/embedding", "pre_tile_positional_embedding.embedding.weight", GRID),
    Part("pre_tile/gate", "pre_tile_positional_embedding.gate", SCALAR),
    Part("post_tile/embedding", "post_tile_positional_embedding.embedding.weight", GRID),
    Part("post_tile/gate", "post_tile_positional_embedding.gate", SCALAR),
    Part("pre_norm/scale", "layernorm_pre.weight"),
    Part("pre_norm/bias", "layernorm_pre.bias"),
    Part("post_norm/scale", "layernorm_post.weight"),
    Part("post_norm/bias", "layernorm_post.bias"),
)
PROJECTOR = (Part("weight", "weight"), Part("bias", "bias"))


class Prefixes(NamedTuple):
    """Where the parts of a model are found among the names of a checkpoint."""

    decoder: str
    head: str
    encoder: str = ""
    projector: str = ""


TEXT = Prefixes("model.", "lm_head.")
# What every release of transformers writes for vision models, and what 5 calls them in memory.
VISION = Prefixes(
    "language_model.model.", "language_model.lm_head.", "vision_model.", "multi_modal_projector."
)
VISION_IN_MEMORY = Prefixes(
    "model.language_model.", "lm_head.", "model.vision_model.", "model.multi_modal_projector."
)


def table(config: LlamaConfig, prefixes: Prefixes | None = None) -> Table:
    """Our parameters under the names of a saved checkpoint, or under those with these prefixes."""
    decoder, vision = config.decoder, config.vision
    prefixes = prefixes or (TEXT if vision is None else VISION)
    embedding = f"{prefixes.decoder}embed_tokens.weight"
    parts = [Part("decoder/embedding/weight", embedding)]
    if vision is not None:
        parts.append(Part("decoder/image_embedding/weight", embedding))
    for address in addresses(decoder):
        home = f"decoder/groups/blocks/{address.slot}/"
        layer = f"{prefixes.decoder}layers.{address.layer}."
        parts += placed(BLOCKS[address.kind], home, layer, address.group)
    parts.append(Part("decoder/final_norm/scale", f"{prefixes.decoder}norm.weight"))
    if not decoder.tied_embedding:
        parts.append(Part("decoder/head/weight", f"{prefixes.head}weight"))
    if vision is None:
        return parts
    parts += placed(ENCODER, "vision/", prefixes.encoder)
    for layer in range(vision.num_local_layers):
        block = f"{prefixes.encoder}transformer.layers.{layer}."
        parts += placed(VISION_BLOCK, "vision/local_blocks/", block, layer)
    for layer in range(vision.num_global_layers):
        block = f"{prefixes.encoder}global_transformer.layers.{layer}."
        parts += placed(VISION_BLOCK + GATES, "vision/global_blocks/", block, layer)
    return parts + placed(PROJECTOR, "projector/", prefixes.projector)


def open_directory(directory: str | os.PathLike, config: LlamaConfig) -> Slices:
    """The weights of a directory that `save_pretrained` wrote.

    Eight cells of each grid of tile embeddings are in no aspect ratio, so not in the checkpoint:
    they are zeros. InputError if a tensor is missing, too many, of another shape or damaged.
    """
    return open_tensors(tensors.open_directory(Path(directory)), config)


def open_tensors(source: Source, config: LlamaConfig) -> Slices:
    """The same from tensors under any of the names that transformers uses."""
    prefixes = TEXT
    if config.vision is not None:
        in_memory = any(name.startswith("model.") for name in source.tensors)
        prefixes = VISION_IN_MEMORY if in_memory else VISION
    embedding, head = f"{prefixes.decoder}embed_tokens.weight", f"{prefixes.head}weight"
    ignore = {name for name in source.tensors if name.endswith(".rotary_emb.inv_freq")}
    repeated = {head: embedding} if config.decoder.tied_embedding else {}
    return ours(
        table(config, prefixes), source, shapes_of(config), ignore=ignore, repeated=repeated
    )


def plan(
    slices: Slices,
    config: LlamaConfig,
    *,
    ids: TokenIds,
    about: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> FlatFiles:
    """A directory that transformers loads; the weights have the dtypes of `slices`.

    `extra_files` are those of the tokenizer, by name. Meta's behaviour is not part of the format: a
    model that follows it (`config.compat`) computes there what transformers makes of it.
    """
    dtype = slices.dtypes["decoder/embedding/weight"]
    small = {
        CONFIG: _json(to_json(config, ids, dtype)),
        GENERATION_CONFIG: _json(token_ids_json(ids)),
    }
    for name, content in (extra_files or {}).items():
        taken = name == CONFIG or name.startswith(("model", MANIFEST))
        if Path(name).name != name or taken:
            raise InputError(f"extra file {name!r}: not a free name for a file; rename it")
        small[name] = content
    files = tensors.plan_files(theirs(_saved_table(config), slices), max_file_bytes)
    if len(files) > 1:
        small[tensors.INDEX] = tensors.index_of(files)
    return FlatFiles(files, about, small)


def _saved_table(config: LlamaConfig) -> Table:
    """What is written: transformers cannot tie the head of a vision model, so it gets a copy."""
    if config.vision is None or not config.decoder.tied_embedding:
        return table(config)
    untied = replace(config, decoder=replace(config.decoder, tied_embedding=False))
    return [
        part._replace(ours="decoder/embedding/weight")
        if part.ours == "decoder/head/weight"
        else part
        for part in table(untied)
    ]


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
