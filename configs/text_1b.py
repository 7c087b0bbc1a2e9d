"""Llama 3.2 1B in the order of the paper: pretraining, six long-context stages, annealing.

    l32jax train configs/text_1b.py
    l32jax plan configs/text_1b.py --topology v5p:4x4x4

Data: folders made by `l32jax data prepare`, see docs/data.md; the shares are the paper's. Hardware:
a pod; nothing of this size was run here (the twin, configs/text_twin.py, is the same recipe and
runs on two CPU cores). Meta made this one from 8B, by pruning and distillation; this is the same
model from random parameters, and its rate is ours.
"""

from l32jax.presets import LLAMA3_2_1B
from l32jax.recipes import text_run
from l32jax.run_config import TrainConfig


def config() -> TrainConfig:
    return text_run(
        LLAMA3_2_1B,
        peak_lr=4e-4,
        directory="runs/text_1b",
        tokenizer="checkpoints/Llama-3.1-8B/tokenizer.model",
    )
