"""Llama 3.2 3B from the pruned 8B, taught by 8B and 70B in the same step.

    l32jax prune Llama-3.1-8B checkpoints/3b-pruned --to llama3.2-3b --calibration data/general
    l32jax train configs/distil_3b.py
    l32jax plan configs/distil_3b.py --topology v5p:8x8x8

Meta says which models taught it, and that it was pruned first; how the teachers count is ours, and
so are the steps. Data: folders made by `l32jax data prepare`, see docs/data.md. Hardware: a pod;
nothing of this size was run here.
"""

from l32jax.objective_config import Teacher
from l32jax.post_training import distilled
from l32jax.presets import LLAMA3_1_8B, LLAMA3_1_70B, LLAMA3_2_3B
from l32jax.run_config import TrainConfig


def config() -> TrainConfig:
    return distilled(
        LLAMA3_2_3B,
        (
            Teacher(model=LLAMA3_1_8B, start_from="checkpoints/Llama-3.1-8B", weight=0.5),
            Teacher(model=LLAMA3_1_70B, start_from="checkpoints/Llama-3.1-70B", weight=0.5),
        ),
        start_from="checkpoints/3b-pruned",
        directory="runs/distil_3b",
    )
