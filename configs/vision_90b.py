"""Llama 3.2 90B Vision from the 70B text model: stage 1 on image-text pairs, then annealing.

    l32jax train configs/vision_90b.py start_from=PATH/Llama-3.1-70B tokenizer=PATH/Llama-3.1-70B

Data: folders made by `l32jax data prepare`, see docs/data.md. Hardware: a pod; nothing of this size
was run here (the twin, configs/vision_twin.py, is the same recipe and runs on two CPU cores).
Steps are the published amounts of data: 6 billion pairs, and 500 million better images, at 16,384
images a step where rows are full.
"""

from l32jax.presets import LLAMA3_2_90B_VISION
from l32jax.recipes import vision_pretrain
from l32jax.run_config import TrainConfig


def config() -> TrainConfig:
    return vision_pretrain(
        LLAMA3_2_90B_VISION,
        start_from="checkpoints/Llama-3.1-70B",
        directory="runs/vision_90b",
    )
