"""What is in the rows of a stage, if they are as full as they can be."""

from collections.abc import Mapping
from typing import NamedTuple

from l32jax.config import LlamaConfig, VisionConfig
from l32jax.data.rows import VisionShape
from l32jax.data.sources.mixture import row_shape
from l32jax.run_config import DataConfig, StageConfig
from l32jax.train.flops import TOKEN_MULTIPLE, Counts, Flops, flops_beside, step_flops


def full_rows(data: DataConfig, model: LlamaConfig) -> Counts:
    """One document a row, no padding; every image slot and every tile slot is used.

    Each token sees one image, of as many tiles as an image has on average.
    """
    rows, length = data.batch_size, data.length
    counts = Counts(
        tokens=rows * length, slots=rows * length, pairs=rows * length * (length + 1) // 2
    )
    vision = row_shape(data, model).vision
    if vision is None:
        return counts
    tokens = rows * length
    return counts + Counts(
        looking=tokens,
        vision_pairs=round(tokens * _tokens_per_image(vision)),
        images=rows * vision.max_images,
        image_slots=rows * vision.max_images,
        tiles=rows * vision.slots,
        tile_slots=rows * vision.slots,
    )


def _tokens_per_image(vision: VisionShape) -> float:
    return vision.slots / vision.max_images * vision.encoder.tokens_per_tile


def visible(data: DataConfig, model: LlamaConfig, *, context: int) -> dict[tuple[int, int], float]:
    """The share of (query, key) pairs that are seen, by the lengths of a call on one device.

    Self-attention is not in it: it is causal.

    Args:
      context: devices that share a row.
    """
    vision = row_shape(data, model).vision
    if vision is None:
        return {}
    tower = vision.encoder.max_tiles * padded_tokens(vision.encoder)
    keys = vision.slots * vision.encoder.tokens_per_tile
    return {(tower, tower): 1.0, (data.length // context, keys): 1 / vision.max_images}


def padded_tokens(encoder: VisionConfig) -> int:
    """Of a tile, with those that fill it up."""
    return -(-encoder.tokens_per_tile // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


class PartFlops(NamedTuple):
    """Operations of a step in one part of the model; useful and, with padding, done."""

    forward: Flops
    backward: Flops
    trains: bool


def flops_by_part(
    stage: StageConfig, model: LlamaConfig, counts: Counts
) -> Mapping[str, PartFlops]:
    """Frozen parts have a backward pass too, where gradients flow through them.

    Models that the objective has beside are parts like others.
    """
    whole, forward = (step_flops(model, trains, counts) for trains in (stage.trains, ()))
    if stage.data.features is not None:
        whole.pop("vision_tower", None)
    beside = flops_beside(stage.objective, model, counts)
    others = {name: PartFlops(found, Flops(0, 0), False) for name, found in beside.items()}
    return others | {
        part: PartFlops(
            forward[part],
            Flops(found.useful - forward[part].useful, found.done - forward[part].done),
            part in stage.trains,
        )
        for part, found in whole.items()
    }
