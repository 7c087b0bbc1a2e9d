"""Fewer neurons in each MLP."""

from typing import Any

import numpy as np

from l32jax.compress.calibration import Calibration, Subject
from l32jax.compress.target import Choice, resized
from l32jax.compress.weights import blocks_of, given, highest, mended, placed, take, with_blocks


def narrow_mlps(subject: Subject, calibration: Calibration, mlp_dim: int) -> tuple[Subject, Choice]:
    """Keeps the neurons that give most, layer by layer, and lets them give for the others."""
    config, params = subject
    scores = calibration.scores(subject)
    down = {slot: np.asarray(b["mlp"]["down"]["weight"]) for slot, b in blocks_of(params).items()}
    kept = {
        slot: highest(given(scores.blocks[slot].neurons, weight), mlp_dim)
        for slot, weight in down.items()
    }
    narrow = mended(calibration, subject, "neurons", down, kept)

    def change(slot: int, block: Any) -> Any:
        rows = {
            name: {"weight": take(np.asarray(block["mlp"][name]["weight"]), kept[slot], 1)}
            for name in ("gate", "up")
        }
        return block | {"mlp": rows | {"down": {"weight": narrow[slot]}}}

    smaller = placed(resized(config, mlp_dim=mlp_dim), with_blocks(params, change))
    return smaller, {"neurons": kept}
