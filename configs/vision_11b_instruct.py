"""Llama 3.2 11B Vision learns to answer: SFT, then DPO, against the frozen trunk.

    l32jax train configs/vision_11b_instruct.py start_from=PATH/Llama-3.2-11B-Vision
    l32jax plan configs/vision_11b_instruct.py --stage 2 --topology v5p:4x4x4 \\
        stages.1.accumulate=4

Text-only dialogs are a fifth of the rows: they see no image, and teach nothing about text, whose
weights are frozen. Data: folders made by `l32jax data prepare`, see docs/data.md. Hardware: a pod;
nothing of this size was run here.
"""

from l32jax.post_training import vision_aligned
from l32jax.presets import LLAMA3_2_11B_VISION_INSTRUCT
from l32jax.run_config import TrainConfig


def config() -> TrainConfig:
    return vision_aligned(
        LLAMA3_2_11B_VISION_INSTRUCT,
        start_from="checkpoints/Llama-3.2-11B-Vision",
        directory="runs/vision_11b_instruct",
    )
