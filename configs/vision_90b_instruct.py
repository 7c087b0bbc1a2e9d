"""Llama 3.2 90B Vision learns to answer: SFT, then DPO, against the frozen trunk.

    l32jax train configs/vision_90b_instruct.py start_from=PATH/Llama-3.2-90B-Vision
    l32jax plan configs/vision_90b_instruct.py --stage 2 --topology v5p:8x8x8

Text-only dialogs are a fifth of the rows: they see no image, and teach nothing about text, whose
weights are frozen. Data: folders made by `l32jax data prepare`, see docs/data.md. Hardware: a pod;
nothing of this size was run here.
"""

from l32jax.post_training import vision_aligned
from l32jax.presets import LLAMA3_2_90B_VISION
from l32jax.run_config import TrainConfig


def config() -> TrainConfig:
    return vision_aligned(
        LLAMA3_2_90B_VISION,
        start_from="checkpoints/Llama-3.2-90B-Vision",
        directory="runs/vision_90b_instruct",
    )
