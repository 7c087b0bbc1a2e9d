"""Llama 3.2 11B Vision from the 8B text model: stage 1 on image-text pairs, then annealing.

    l32jax train configs/vision_11b.py start_from=PATH/Llama-3.1-8B tokenizer=PATH/Llama-3.1-8B

Data: folders made by `l32jax data prepare`, see docs/data.md. Hardware: a pod; nothing of this size
was run here (the twin, configs/vision_twin.py, is the same recipe and runs on two CPU cores).
Steps are the published amounts of data: 6 billion pairs, and 500 million better images, at 16,384
images a step where rows are full.
"""

from l32jax.presets import LLAMA3_2_11B_VISION
from l32jax.recipes import vision_stage1, vision_stage2_anneal
from l32jax.run_config import DataConfig, TrainConfig


def config() -> TrainConfig:
    pairs = DataConfig(
        mixture=(("data/pairs", 1.0),),
        batch_size=512,
        length=2048,
        max_images=32,
        vision_tiles=96,
        packing_rows=64,
        workers=8,
    )
    better = DataConfig(
        mixture=(
            ("data/pairs_resampled", 0.70),
            ("data/grounding", 0.06),
            ("data/screenshots", 0.06),
            ("data/questions", 0.06),
            ("data/synthetic_captions", 0.06),
            ("data/synthetic_structure", 0.06),
        ),
        batch_size=512,
        length=4096,
        max_images=32,
        vision_tiles=96,
        packing_rows=64,
        workers=8,
    )
    return TrainConfig(
        model=LLAMA3_2_11B_VISION,
        stages=(
            vision_stage1(pairs, num_steps=366_000),
            vision_stage2_anneal(better, num_steps=30_500),
        ),
        directory="runs/vision_11b",
        start_from="checkpoints/Llama-3.1-8B",
        dtype="bfloat16",
        params="bfloat16",
        saved="attention",
        save_every=1000,
    )
