"""The memory of a step by arithmetic: what stays, what is saved, what the largest layer needs."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from l32jax.config import DecoderConfig, LlamaConfig, Part
from l32jax.objective_config import keeps_reference, models_beside
from l32jax.plan.blocks import Block, Work
from l32jax.plan.chips import Chip
from l32jax.plan.program import Memory
from l32jax.run_config import StageConfig, TrainConfig
from l32jax.train.chunks import MAX_LOGITS
from l32jax.train.flops import lora_weights

LANES = 128
HALF, WHOLE = 2, 4  # bytes of a number
# Of a frozen number in a matrix; those of int4 share a scale by 32.
FROZEN = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}
WORKING = 4  # of a layer's numbers, as many arrays at a time; more of them are inside of fusions
FEATURES = 3  # copies of the encoder's features: as taps, side by side, and their gradient
RESERVED = 2**28  # bytes that the compiler keeps for itself


class Scored(NamedTuple):
    """Positions by words of a device: the chunks they are scored in, and numbers of each."""

    chunks: int
    numbers: float


def scored(work: Work) -> Scored:
    numbers = work.tables.tokens * work.tables.words / work.blocks[0].share
    chunks = max(1, math.ceil(numbers / MAX_LOGITS))
    return Scored(chunks, numbers / chunks)


def weights_of(model: LlamaConfig) -> dict[Part, int]:
    """Numbers in matrices; norms and gates are too few to count."""
    decoder = model.decoder
    heads, kv = (n * decoder.head_dim for n in (decoder.num_heads, decoder.num_kv_heads))
    block = decoder.embed_dim * (2 * heads + 2 * kv + 3 * decoder.mlp_dim)
    tables = table_weights(decoder)
    found: dict[Part, int] = {"language_model": decoder.count("self") * block + tables}
    if model.loras:
        found["lora"] = sum(lora_weights(model).values())
    if vision := model.vision:
        layers = vision.num_local_layers + vision.num_global_layers
        one = 4 * vision.embed_dim**2 + 2 * vision.embed_dim * vision.mlp_dim
        projector = vision.feature_dim * decoder.embed_dim
        found["adapter"] = decoder.count("cross") * block + projector
        found["vision_tower"] = layers * one
    return found


def table_weights(decoder: DecoderConfig) -> int:
    """Of words, looked up or scored."""
    return (1 if decoder.tied_embedding else 2) * decoder.vocab_size * decoder.embed_dim


def saved_bytes(block: Block, saved: str, chip: Chip) -> float:
    """Of all layers, for the backward pass."""
    wide = _padded(block.head_dim, chip)
    out = block.tokens * (block.heads * wide * HALF + block.heads * WHOLE)
    kept = block.tokens * block.width * HALF / block.together  # what a layer begins with
    if saved != "nothing":
        kept += out
    if saved in ("dots", "everything"):
        kept += block.tokens * HALF * (block.heads * wide + block.width)
        kept += block.tokens * HALF * (block.matrices - 1) * block.mlp
        kept += block.projected * HALF * 2 * block.kv_heads * wide
    if saved == "everything":  # normalised, rotated and gated ones as well, some in float32
        kept += block.tokens * (WHOLE * 2 * block.width + HALF * block.heads * wide)
        kept += block.tokens * WHOLE * 2 * block.mlp
    return kept * block.layers / block.share


def learned_by(config: TrainConfig, number: int, mesh: Mapping[str, int]) -> float:
    """Numbers of the parameters that train, of one device."""
    return _numbers(config, number, mesh, trains=True)


def _numbers(config: TrainConfig, number: int, mesh: Mapping[str, int], *, trains: bool) -> float:
    weights, stage = weights_of(config.model_of(number)), config.stages[number]
    found = sum(count for part, count in weights.items() if (part in stage.trains) == trains)
    return found / (mesh["fsdp"] * mesh["tensor"])


def _beside(config: TrainConfig, number: int, mesh: Mapping[str, int]) -> float:
    """Numbers of the models that the objective has beside: of a reference, what trains."""
    objective = config.stages[number].objective
    teachers = models_beside(objective, config.model).get("teachers", ())
    numbers = sum(sum(weights_of(model).values()) for model in teachers)
    reference = learned_by(config, number, mesh) if keeps_reference(objective) else 0.0
    return numbers / (mesh["fsdp"] * mesh["tensor"]) + reference


def moment_bytes(stage: StageConfig) -> int:
    """Of a parameter. Only AdamW keeps the second moments of all numbers."""
    first = HALF if stage.optimizer.momentum == "bfloat16" else WHOLE
    return first + (WHOLE if stage.optimizer.kind == "adamw" else 0)


def memory_of(
    config: TrainConfig, number: int, chip: Chip, mesh: Mapping[str, int], work: Work
) -> Memory:
    """Bytes of one device, by parts."""
    stage = config.stages[number]
    learned, frozen = (_numbers(config, number, mesh, trains=trains) for trains in (True, False))
    beside = _beside(config, number, mesh)
    params = learned * WHOLE + (frozen + beside) * FROZEN[config.params]
    if config.params in ("int8", "int4") and "language_model" not in stage.trains:
        tables = table_weights(config.model.decoder) / (mesh["fsdp"] * mesh["tensor"])
        params += tables * (HALF - FROZEN[config.params])  # never quantised
    moments = 0 if config.offload == "optimizer" else moment_bytes(stage)
    optimizer = learned * (moments + (0 if stage.average == "none" else WHOLE))
    batch = _batch_bytes(config, number, mesh)
    gradients = learned * (WHOLE * (2 if stage.accumulate > 1 else 1) + HALF)
    peak = params + optimizer + batch + gradients + _activations(config, work, chip)
    fits = peak + RESERVED <= chip.hbm_bytes
    return Memory(round(params), round(optimizer), round(batch), round(peak), fits)


def _batch_bytes(config: TrainConfig, number: int, mesh: Mapping[str, int]) -> float:
    data, model = config.stages[number].data, config.model_of(number)
    rows = data.batch_size / (mesh["data"] * mesh["fsdp"])
    found = rows * data.length / mesh["context"] * 6 * WHOLE
    if data.max_images and model.vision is not None and data.features is None:
        pixels = 3 * model.vision.image_size**2  # a byte each
        found += rows * data.max_images * model.vision.max_tiles * pixels / mesh["context"]
    return found


def _activations(config: TrainConfig, work: Work, chip: Chip) -> float:
    trained = [block for block in work.blocks if block.backward]
    found = sum(saved_bytes(block, config.saved, chip) for block in trained)
    tables = work.tables
    # Tables are float32 where they learn, and then their gradient is as large.
    of_table = 2 * WHOLE if tables.learns else HALF
    scoring = tables.weights / work.blocks[0].share * of_table + 2 * WHOLE * scored(work).numbers
    found += max(scoring, *(_working(block) for block in work.blocks))
    if tables.projected:
        found += tables.projected * HALF * (FEATURES * tables.feature_dim + 2 * tables.width)
    return found


def _working(block: Block) -> float:
    """Of the layer that is computed, its weights and their gradient among it."""
    arrays = block.tokens * HALF * WORKING * (block.width + block.mlp / block.share)
    gathered = block.weights / block.share * HALF * (1 + block.learns)
    return arrays + gathered


def _padded(head_dim: int, chip: Chip) -> int:
    whole = chip.platform == "tpu" and head_dim > LANES // 2
    return -(-head_dim // LANES) * LANES if whole else head_dim
