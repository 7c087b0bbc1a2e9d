"""One table for both ends of a model that had two."""

import numpy as np

from l32jax.compress.calibration import Calibration, Subject
from l32jax.compress.target import Choice, resized
from l32jax.compress.weights import placed
from l32jax.model.parameters import Params


def tie(subject: Subject, calibration: Calibration) -> tuple[Subject, Choice]:
    """Keeps the embedding, the head, or the mean of both: what has the lowest loss.

    Each as large as the embedding was, for the stream; the last norm makes up for it at the head.
    """
    config, params = subject
    tied = resized(config, tied_embedding=True)
    embedding, head = (
        np.asarray(params["decoder"][name]["weight"], np.float32) for name in ("embedding", "head")
    )
    ratio = _size(head) / _size(embedding)
    tables = {
        "embedding": embedding,
        "head": head / ratio,
        "mean": (embedding + head / ratio) / 2,
    }
    candidates = {name: placed(tied, _with(params, t, ratio)) for name, t in tables.items()}
    losses = {name: calibration.loss(found) for name, found in candidates.items()}
    best = min(losses, key=losses.__getitem__)
    return candidates[best], {"table": best, "losses": losses}


def _with(params: Params, table: np.ndarray, ratio: float) -> Params:
    decoder = {name: part for name, part in params["decoder"].items() if name != "head"}
    dtype, scale = decoder["embedding"]["weight"].dtype, decoder["final_norm"]["scale"]
    larger = (np.asarray(scale, np.float32) * ratio).astype(scale.dtype)
    ends = {"embedding": {"weight": table.astype(dtype)}, "final_norm": {"scale": larger}}
    return params | {"decoder": decoder | ends}


def _size(table: np.ndarray) -> float:
    return float(np.sqrt(np.mean(table**2)))
