"""Fewer rows and columns of weights, on the host."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from l32jax.compress.calibration import Calibration, Subject
from l32jax.config import LlamaConfig
from l32jax.model.activations import Place
from l32jax.model.llama import abstract_params
from l32jax.model.parameters import Params, on_mesh

# Of the mean square of a kept input, added to each: what is inferred from inputs that hardly vary
# would be noise.
RIDGE = 1e-2


def highest(scores: Float[np.ndarray, "*lead a"], count: int) -> Int[np.ndarray, "*lead kept"]:
    """Indices of the highest scores along the last dim, in ascending order."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)


def take(weight: np.ndarray, kept: Int[np.ndarray, "l kept"], axis: int) -> np.ndarray:
    """Of a stacked weight, what each group keeps along an axis."""
    shape = [1] * weight.ndim
    shape[0], shape[axis] = kept.shape
    return np.take_along_axis(weight, kept.reshape(shape), axis)


def transferred(
    weight: Float[np.ndarray, "o a"], moments: Float[np.ndarray, "a a"], kept: Int[np.ndarray, "k"]
) -> Float[np.ndarray, "o k"]:
    """The kept columns, which take over what the others gave as far as their own inputs tell it.

    The least squares fit of removed inputs by kept ones, with second moments in place of inputs;
    float64.
    """
    removed = np.setdiff1d(np.arange(len(moments)), kept)
    weight = weight.astype(np.float64)
    known = moments[np.ix_(kept, kept)]
    ridge = RIDGE * max(np.trace(known) / len(kept), np.finfo(np.float32).tiny)
    known = known + ridge * np.eye(len(kept))
    share = np.linalg.solve(known, moments[np.ix_(kept, removed)])
    return weight[:, kept] + weight[:, removed] @ share.T


def mended(
    calibration: Calibration,
    subject: Subject,
    place: Place,
    weights: Mapping[int, Float[np.ndarray, "l o a"]],
    kept: Mapping[int, Int[np.ndarray, "l k"]],
    scales: Mapping[int, Float[np.ndarray, "l a"]] | None = None,
) -> dict[int, Float[np.ndarray, "l o k"]]:
    """`transferred`, for the weights of each slot that read a place, perhaps scaled."""
    found = {slot: take(weight, kept[slot], 2) for slot, weight in weights.items()}
    for group, moments in enumerate(calibration.moments(subject, place)):
        for slot, weight in weights.items():
            known = moments[slot]
            if scales is not None:
                known = known * np.outer(scales[slot][group], scales[slot][group])
            found[slot][group] = transferred(weight[group], known, kept[slot][group])
    return found


def rescaled(
    scale: Float[np.ndarray, "l a"],
    squares: Float[np.ndarray, "l a"],
    kept: Int[np.ndarray, "l k"],
) -> Float[np.ndarray, "l k"]:
    """Of RMSNorms over fewer values, so that these come out as large as before.

    Args:
      squares: mean squares of the normalised values; where those of the kept have the mean r, their
        root mean square is, in the mean, sqrt(r) of that of all.
    """
    ratio = np.sqrt(take(squares, kept, 1).mean(axis=1, keepdims=True))
    return (take(scale, kept, 1) * ratio).astype(scale.dtype)


def given(
    squares: Float[np.ndarray, "l *a"], weight: Float[np.ndarray, "l d *a"]
) -> Float[np.ndarray, "l *a"]:
    """What each input adds to the stream: its mean square, times that of the weights it meets."""
    met = [(group.astype(np.float32) ** 2).sum(axis=0, dtype=np.float64) for group in weight]
    return squares * np.stack(met)


def blocks_of(params: Params) -> dict[Any, Any]:
    """By slot of the group pattern."""
    return params["decoder"]["groups"]["blocks"]


def with_blocks(
    params: Params, change: Callable[[int, Mapping[str, Any]], Mapping[str, Any]]
) -> Params:
    """The parameters with `change(slot, block)` in place of each block."""
    blocks = {slot: change(int(slot), block) for slot, block in blocks_of(params).items()}
    decoder = params["decoder"]
    return params | {"decoder": decoder | {"groups": {"blocks": blocks}}}


def placed(config: LlamaConfig, params: Params) -> Subject:
    """Parameters, some of them on the host, on the mesh; a leaf keeps its dtype."""

    def put(leaf: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
        assert leaf.shape == target.shape, (leaf.shape, target.shape)
        return jax.device_put(leaf, target.sharding)

    targets = on_mesh(abstract_params(config), jax.sharding.get_mesh())
    return Subject(config, jax.tree.map(put, params, targets))
