"""Hugging Face's checkpoints of Llama and Llama Vision ("mllama"): names, layouts, directories."""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l32jax.checkpoint import tensors
from l32jax.checkpoint.hugging_face_config import (
    ASPECT_RATIOS,
    CONFIG,
    TokenIds,
    read_config,
    to_json,
    token_ids_json,
)
from l32jax.checkpoint.tables import (
    HEADS_IN,
    HEADS_OUT,
    SCALAR,
    Layout,
    Part,
    Shape,
    Source,
    Table,
    addresses,
    placed,
    their_shapes,
    unload,
)
from l32jax.checkpoint.tables import load as load_table
from l32jax.config import LlamaConfig
from l32jax.errors import InputError
from l32jax.model.parameters import Params, flatten

__all__ = ["TokenIds", "export", "load", "read_config", "table"]

GENERATION_CONFIG = "generation_config.json"
MAX_FILE_BYTES = 5_000_000_000
UNFINISHED = ".unfinished"

logger = logging.getLogger(__name__)


def _patches(shape: Shape) -> Shape:
    """[d 3*size*size] as a convolution's [d, 3, size, size]."""
    size = math.isqrt(shape[1] // 3)
    return (shape[0], 3, size, size)


def _to_grid(theirs: np.ndarray, shape: Shape) -> np.ndarray:
    """The cells of our [c c *rest] that the rows of their aspect ratios hold, zeros elsewhere."""
    side = shape[0]
    rows = theirs.reshape(len(ASPECT_RATIOS) + 1, side, *shape[2:])
    grid, known = np.zeros(shape, theirs.dtype), np.zeros((side, side), bool)
    for row, (height, width) in zip(rows[1:], ASPECT_RATIOS, strict=True):
        if row[height * width :].any():
            raise InputError(
                f"its row for {height}x{width} tiles has values for tiles beyond them, where this "
                "model has none; take these tables from the released checkpoint"
            )
        for tile, cell in enumerate(row[: height * width]):
            y, x = divmod(tile, width)
            if known[y, x] and not np.array_equal(grid[y, x], cell):
                raise InputError(
                    f"its rows disagree about the tile at {(y, x)}: they were trained apart, "
                    "while this model has one embedding for each place in the grid; "
                    "take these tables from the released checkpoint"
                )
            grid[y, x], known[y, x] = cell, True
    return grid


def _from_grid(ours: np.ndarray, shape: Shape) -> np.ndarray:
    side = ours.shape[0]
    rows = np.zeros((shape[0], side, *ours.shape[2:]), ours.dtype)
    for row, (height, width) in zip(rows[1:], ASPECT_RATIOS, strict=True):
        row[: height * width] = ours[:height, :width].reshape(height * width, *ours.shape[2:])
    return rows.reshape(shape)


PATCHES = Layout(_patches)
# Row r of theirs is the aspect ratio r - 1 of the list; row 0 is of images that are absent.
GRID = Layout(lambda shape: (len(ASPECT_RATIOS) + 1, math.prod(shape[1:])), _to_grid, _from_grid)

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
        ours = f"decoder/groups/blocks/{address.slot}/"
        theirs = f"{prefixes.decoder}layers.{address.layer}."
        parts += placed(BLOCKS[address.kind], ours, theirs, address.group)
    parts.append(Part("decoder/final_norm/scale", f"{prefixes.decoder}norm.weight"))
    if not decoder.tied_embedding:
        parts.append(Part("decoder/head/weight", f"{prefixes.head}weight"))
    if vision is None:
        return parts
    parts += placed(ENCODER, "vision/", prefixes.encoder)
    for layer in range(vision.num_local_layers):
        theirs = f"{prefixes.encoder}transformer.layers.{layer}."
        parts += placed(VISION_BLOCK, "vision/local_blocks/", theirs, layer)
    for layer in range(vision.num_global_layers):
        theirs = f"{prefixes.encoder}global_transformer.layers.{layer}."
        parts += placed(VISION_BLOCK + GATES, "vision/global_blocks/", theirs, layer)
    return parts + placed(PROJECTOR, "projector/", prefixes.projector)


def load(directory: str | os.PathLike, config: LlamaConfig, targets: Params) -> Params:
    """The weights of a directory that `save_pretrained` wrote, placed as `targets` says.

    Eight cells of each grid of tile embeddings are in no aspect ratio, so not in the checkpoint:
    they become zeros. InputError if a tensor is missing, too many, of another shape or damaged.
    """
    return load_tensors(tensors.open_directory(Path(directory)), config, targets)


def load_tensors(source: Source, config: LlamaConfig, targets: Params) -> Params:
    """The same from tensors under any of the names that transformers uses."""
    prefixes = TEXT
    if config.vision is not None:
        in_memory = any(name.startswith("model.") for name in source.shapes)
        prefixes = VISION_IN_MEMORY if in_memory else VISION
        logger.warning(
            "%s: half of the tile embeddings, those of no supported aspect ratio, are not in "
            "Hugging Face's format; they are zeros now",
            source.where,
        )
    embedding, head = f"{prefixes.decoder}embed_tokens.weight", f"{prefixes.head}weight"
    ignore = {name for name in source.shapes if name.endswith(".rotary_emb.inv_freq")}
    repeated = {head: embedding} if config.decoder.tied_embedding else {}
    return load_table(table(config, prefixes), source, targets, ignore=ignore, repeated=repeated)


def export(
    params: Params,
    config: LlamaConfig,
    directory: str | os.PathLike,
    *,
    dtype: Any,
    ids: TokenIds,
    extra_files: Mapping[str, bytes] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes a directory that transformers loads, whole or not at all.

    It must not exist yet, or be empty. `dtype` is float32, float16 or bfloat16; `extra_files`
    are those of the tokenizer, by name. Meta's behaviour is not part of the format: a model that
    follows it (`config.compat`) computes there what transformers makes of it.
    """
    directory = Path(directory)
    files = {
        CONFIG: _json(to_json(config, ids, dtype)),
        GENERATION_CONFIG: _json(token_ids_json(ids)),
    }
    for name, content in (extra_files or {}).items():
        if Path(name).name != name or name in files or name.startswith("model"):
            raise InputError(f"extra file {name!r}: not a free name for a file; rename it")
        files[name] = content
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"export to {directory}: it exists already; choose another directory")
    temporary = directory.with_name(directory.name + UNFINISHED)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(temporary, params, config, dtype, max_file_bytes)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        os.rename(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_weights(
    directory: Path, params: Params, config: LlamaConfig, dtype: Any, max_file_bytes: int
) -> None:
    parts = list(table(config))
    if config.vision is not None and config.decoder.tied_embedding:
        # transformers cannot tie the head of a vision model, so it gets a copy.
        parts.append(Part("decoder/embedding/weight", f"{VISION.head}weight"))
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    stream = unload(parts, params, np.dtype(dtype))
    tensors.save_directory(directory, stream, their_shapes(parts, shapes), dtype, max_file_bytes)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
