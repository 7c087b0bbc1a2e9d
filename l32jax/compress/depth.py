"""Fewer layers."""

import jax
import numpy as np

from l32jax.compress.calibration import Calibration, Subject
from l32jax.compress.target import Choice, resized
from l32jax.compress.weights import highest, placed


def drop_groups(
    subject: Subject, calibration: Calibration, num_groups: int
) -> tuple[Subject, Choice]:
    """Keeps the groups that change the stream most: of a text model, each is a layer.

    Of a vision model a group is dropped whole, cross-attention with the layers around it, so that
    the pattern stays.
    """
    config, params = subject
    influence = calibration.scores(subject).influence
    kept = highest(influence, num_groups)
    decoder = params["decoder"]
    groups = jax.tree.map(lambda weight: np.asarray(weight)[kept], decoder["groups"])
    fewer = params | {"decoder": decoder | {"groups": groups}}
    return placed(resized(config, num_groups=num_groups), fewer), {
        "groups": kept,
        "influence": influence,
    }
