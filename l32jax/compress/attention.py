"""Fewer heads, and fewer dims in each."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from l32jax.compress.calibration import BlockScores, Calibration, Subject
from l32jax.compress.target import Choice, resized
from l32jax.compress.weights import (
    blocks_of,
    given,
    highest,
    mended,
    placed,
    rescaled,
    take,
    with_blocks,
)
from l32jax.model.parameters import Params


def drop_heads(
    subject: Subject, calibration: Calibration, num_heads: int, num_kv_heads: int
) -> tuple[Subject, Choice]:
    """Keeps the key/value heads whose queries give most, and of their query heads as many each."""
    config, params = subject
    scores = calibration.scores(subject)
    out = _outs(params)
    kept, inputs = {}, {}
    for slot, weight in out.items():
        each = given(scores.blocks[slot].heads, weight).sum(axis=-1)
        kept[slot] = _kept_heads(each, config.decoder.num_kv_heads, num_heads, num_kv_heads)
        dims = np.arange(config.decoder.head_dim)
        inputs[slot] = _flat(kept[slot][1][..., None] * config.decoder.head_dim + dims)
    narrow = _mended(calibration, subject, out, inputs)

    def change(slot: int, block: Any) -> Any:
        of_keys, of_queries = kept[slot]
        attention = dict(block["attention"])
        for name, heads in (("query", of_queries), ("key", of_keys), ("value", of_keys)):
            attention[name] = {"weight": take(np.asarray(attention[name]["weight"]), heads, 1)}
        shape = (*narrow[slot].shape[:2], num_heads, -1)
        attention["out"] = {"weight": narrow[slot].reshape(shape)}
        return block | {"attention": attention}

    smaller = resized(config, num_heads=num_heads, num_kv_heads=num_kv_heads)
    chosen = {
        "kv_heads": {slot: heads[0] for slot, heads in kept.items()},
        "heads": {slot: heads[1] for slot, heads in kept.items()},
    }
    return placed(smaller, with_blocks(params, change)), chosen


def shorten_heads(
    subject: Subject, calibration: Calibration, head_dim: int
) -> tuple[Subject, Choice]:
    """Keeps the rotary pairs that turn as those of shorter heads do, and the values that give most.

    Pair i of heads of h' turns as pair i * h / h' of heads of h. Queries and keys of
    cross-attention do not turn: they keep the dims that their products are largest in.
    """
    config, params = subject
    before = config.decoder
    scores = calibration.scores(subject)
    pairs = rotary_dims(before.head_dim, head_dim)
    compared = {
        slot: _compared(block, scores.blocks[slot], head_dim, pairs)
        for slot, block in blocks_of(params).items()
    }
    # Values are judged, and mended, where queries and keys are short already.
    blind = placed(config, with_blocks(params, lambda slot, block: _blind(block, compared[slot])))
    seen, out = calibration.scores(blind), _outs(params)
    values, inputs = {}, {}
    for slot, weight in out.items():
        each = given(seen.blocks[slot].heads, weight)
        grouped = each.reshape(len(each), before.num_kv_heads, -1, before.head_dim)
        values[slot] = highest(grouped.sum(axis=2), head_dim)
        of_heads = np.repeat(values[slot], grouped.shape[2], axis=1)
        inputs[slot] = _flat(of_heads + np.arange(before.num_heads)[:, None] * before.head_dim)
    narrow = _mended(calibration, blind, out, inputs)

    def change(slot: int, block: Any) -> Any:
        attention = _shortened(block["attention"], compared[slot], scores.blocks[slot])
        value = np.asarray(attention["value"]["weight"])
        value = np.take_along_axis(value, values[slot][..., None], axis=2)
        shape = (*narrow[slot].shape[:2], before.num_heads, head_dim)
        more = {"value": {"weight": value}, "out": {"weight": narrow[slot].reshape(shape)}}
        return block | {"attention": attention | more}

    smaller = placed(resized(config, head_dim=head_dim), with_blocks(params, change))
    return smaller, {"query_and_key_dims": compared, "value_dims": values}


def rotary_dims(head_dim: int, shorter: int) -> Int[np.ndarray, "kept"]:
    """Of a head, the dims of the pairs whose frequencies heads of `shorter` have, in their order.

    Pairs are halves apart (`model.rope`).
    """
    pairs = np.arange(0, head_dim // 2, head_dim // shorter)
    return np.concatenate([pairs, pairs + head_dim // 2])


def _kept_heads(
    scores: Float[np.ndarray, "l n"], num_kv_heads: int, keep: int, keep_kv: int
) -> tuple[Int[np.ndarray, "l k"], Int[np.ndarray, "l n_kept"]]:
    """Key/value heads, and query heads."""
    grouped = scores.reshape(len(scores), num_kv_heads, -1)
    best = highest(grouped, keep // keep_kv)
    groups = highest(np.take_along_axis(grouped, best, axis=2).sum(axis=2), keep_kv)
    heads = best + np.arange(num_kv_heads)[:, None] * grouped.shape[2]
    return groups, _flat(np.take_along_axis(heads, groups[..., None], axis=1))


def _compared(
    block: Any, scores: BlockScores, head_dim: int, pairs: Int[np.ndarray, "kept"]
) -> Int[np.ndarray, "l kept"]:
    """The dims that queries and keys keep."""
    attention = block["attention"]
    if scores.query_norm is None or scores.key_norm is None:
        return np.tile(pairs, (len(attention["query"]["weight"]), 1))
    query, key = (np.asarray(attention[n]["scale"], np.float64) for n in ("query_norm", "key_norm"))
    return highest(scores.query_norm * query**2 * scores.key_norm * key**2, head_dim)


def _blind(block: Any, compared: Int[np.ndarray, "l kept"]) -> Any:
    """The block with the products of all other dims left out of its attention."""
    attention = block["attention"]
    if "query_norm" in attention:
        scale = _only(np.asarray(attention["query_norm"]["scale"]), compared, 1)
        return block | {"attention": attention | {"query_norm": {"scale": scale}}}
    weight = _only(np.asarray(attention["query"]["weight"]), compared, 2)
    return block | {"attention": attention | {"query": {"weight": weight}}}


def _only(weight: np.ndarray, kept: Int[np.ndarray, "l kept"], axis: int) -> np.ndarray:
    is_kept = np.zeros((len(weight), weight.shape[axis]), bool)
    np.put_along_axis(is_kept, kept, True, axis=1)
    shape = [1] * weight.ndim
    shape[0], shape[axis] = is_kept.shape
    return np.where(is_kept.reshape(shape), weight, np.zeros((), weight.dtype))


def _shortened(attention: Any, compared: Int[np.ndarray, "l kept"], scores: BlockScores) -> Any:
    """Queries and keys; scores are divided by the root of fewer dims, so queries are shrunk."""
    shorter = {
        name: {"weight": take(np.asarray(attention[name]["weight"]), compared, 2)}
        for name in ("query", "key")
    }
    query = shorter["query"]["weight"]
    shrunk = (compared.shape[1] / attention["query"]["weight"].shape[2]) ** 0.5
    if scores.query_norm is None or scores.key_norm is None:
        shorter["query"] = {"weight": (query * shrunk).astype(query.dtype)}
        return attention | shorter
    norms = {
        name: {"scale": rescaled(np.asarray(attention[name]["scale"]), squares, compared)}
        for name, squares in (("query_norm", scores.query_norm), ("key_norm", scores.key_norm))
    }
    scale = norms["query_norm"]["scale"]
    norms["query_norm"]["scale"] = (scale * shrunk).astype(scale.dtype)
    return attention | shorter | norms


def _outs(params: Params) -> dict[int, Float[np.ndarray, "l d n h"]]:
    return {
        slot: np.asarray(block["attention"]["out"]["weight"])
        for slot, block in blocks_of(params).items()
    }


def _mended(
    calibration: Calibration,
    subject: Subject,
    out: dict[int, Float[np.ndarray, "l d n h"]],
    inputs: dict[int, Int[np.ndarray, "l kept"]],
) -> dict[int, Float[np.ndarray, "l d kept"]]:
    """By slot: the weights of what is kept of the heads' outputs, which give for the others too."""
    flat = {slot: weight.reshape(*weight.shape[:2], -1) for slot, weight in out.items()}
    return mended(calibration, subject, "heads", flat, inputs)


def _flat(indices: Int[np.ndarray, "l n h"]) -> Int[np.ndarray, "l nh"]:
    return indices.reshape(len(indices), -1)
