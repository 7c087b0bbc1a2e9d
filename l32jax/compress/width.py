"""A narrower residual stream: fewer channels of everything that reads it and writes to it."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from l32jax.compress.calibration import BlockScores, Calibration, Scores, Subject
from l32jax.compress.target import Choice, resized
from l32jax.compress.weights import (
    blocks_of,
    highest,
    mended,
    placed,
    rescaled,
    with_blocks,
)
from l32jax.model.activations import Place
from l32jax.model.parameters import Params

Channels = Int[np.ndarray, "kept"]
READERS: dict[Place, tuple[str, tuple[str, ...]]] = {
    "attention_norm": ("attention", ("query", "key", "value")),
    "mlp_norm": ("mlp", ("gate", "up")),
}


def narrow_stream(
    subject: Subject, calibration: Calibration, embed_dim: int
) -> tuple[Subject, Choice]:
    """Keeps the channels that are largest where the blocks and the head read them.

    What reads them infers the others, as far as they tell. The channels of image tokens, which only
    cross-attention reads, are chosen by themselves.
    """
    config, params = subject
    scores = calibration.scores(subject)
    kept = highest(_read(params, scores), embed_dim)
    seen = None if scores.vision is None else highest(scores.vision, embed_dim)
    narrow = {place: _readers(subject, calibration, place, kept) for place in READERS}

    def change(slot: int, block: Any) -> Any:
        block = _with_norms(block, scores.blocks[slot], kept)
        block = _with_writers(block, kept)
        for (part, _), readers in zip(READERS.values(), narrow.values(), strict=True):
            block = block | {part: block[part] | readers[slot]}
        return block if seen is None else _seeing(block, seen)

    smaller = with_blocks(params, change)
    ends = _ends(params["decoder"], scores, kept)
    smaller = smaller | {"decoder": smaller["decoder"] | ends}
    if seen is not None:
        projector = {name: np.asarray(leaf)[seen] for name, leaf in params["projector"].items()}
        smaller = smaller | {"projector": projector}
    chosen = {"channels": kept} | ({} if seen is None else {"image_channels": seen})
    return placed(resized(config, embed_dim=embed_dim), smaller), chosen


def _read(params: Params, scores: Scores) -> Float[np.ndarray, "d"]:
    """Mean squares of what all norms give, scaled."""
    total = scores.final_norm * np.asarray(params["decoder"]["final_norm"]["scale"], float) ** 2
    for slot, block in blocks_of(params).items():
        for place in READERS:
            scale = np.asarray(block[place]["scale"], np.float64)
            total = total + (getattr(scores.blocks[slot], place) * scale**2).sum(axis=0)
    return total


def _readers(
    subject: Subject, calibration: Calibration, place: Place, kept: Channels
) -> dict[int, dict[str, Any]]:
    """By slot: the projections that read what a norm gives, which infer what it no longer gives."""
    part, names = READERS[place]
    blocks = blocks_of(subject.params)
    weights, scales, indices, shapes = {}, {}, {}, {}
    for slot, block in blocks.items():
        # Keys and values of cross-attention read image tokens.
        names_here = names[:1] if "query_norm" in block[part] else names
        each = {name: np.asarray(block[part][name]["weight"]) for name in names_here}
        shapes[slot] = {name: weight.shape[1:-1] for name, weight in each.items()}
        flat = [weight.reshape(len(weight), -1, weight.shape[-1]) for weight in each.values()]
        weights[slot] = np.concatenate(flat, axis=1)
        scales[slot] = np.asarray(block[place]["scale"], np.float64)
        indices[slot] = _everywhere(kept, len(weights[slot]))
    narrow = mended(calibration, subject, place, weights, indices, scales)
    return {slot: _split(narrow[slot], shapes[slot]) for slot in blocks}


def _split(
    weight: Float[np.ndarray, "l o k"], shapes: dict[str, tuple[int, ...]]
) -> dict[str, dict[str, np.ndarray]]:
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])[:-1]
    parts = np.split(weight, ends, axis=1)
    return {
        name: {"weight": part.reshape(len(part), *shape, -1)}
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _with_norms(block: Any, scores: BlockScores, kept: Channels) -> Any:
    norms = {}
    for place in READERS:
        scale = np.asarray(block[place]["scale"])
        norms[place] = {
            "scale": rescaled(scale, getattr(scores, place), _everywhere(kept, len(scale)))
        }
    return block | norms


def _with_writers(block: Any, kept: Channels) -> Any:
    out = np.asarray(block["attention"]["out"]["weight"])[:, kept]
    down = np.asarray(block["mlp"]["down"]["weight"])[:, kept]
    return block | {
        "attention": block["attention"] | {"out": {"weight": out}},
        "mlp": block["mlp"] | {"down": {"weight": down}},
    }


def _seeing(block: Any, seen: Channels) -> Any:
    """Cross-attention's keys and values, of fewer channels of image tokens."""
    attention = block["attention"]
    if "query_norm" not in attention:
        return block
    narrow = {
        name: {"weight": np.asarray(attention[name]["weight"])[..., seen]}
        for name in ("key", "value")
    }
    return block | {"attention": attention | narrow}


def _ends(decoder: Any, scores: Scores, kept: Channels) -> dict[str, Any]:
    """Tables, and the last norm."""
    tables = {
        name: {"weight": np.asarray(decoder[name]["weight"])[:, kept]}
        for name in ("embedding", "image_embedding", "head", "reward_head")
        if name in decoder
    }
    scale = np.asarray(decoder["final_norm"]["scale"])[None]
    scale = rescaled(scale, scores.final_norm[None], kept[None])[0]
    return tables | {"final_norm": {"scale": scale}}


def _everywhere(kept: Channels, num_groups: int) -> Int[np.ndarray, "l kept"]:
    return np.tile(kept, (num_groups, 1))
