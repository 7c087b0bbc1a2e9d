"""A small model begins to learn sums, and is stopped early: where rounds of post-training start.

    l32jax train configs/arithmetic_base.py

On two CPU cores: two or three minutes. It answers about a quarter of the sums that it has not seen;
configs/arithmetic_rounds.py and configs/arithmetic_grpo.py go on from there.
"""

from l32jax.presets import TINY_TEXT
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=TINY_TEXT,
        directory="runs/arithmetic_base",
        stages=(
            StageConfig(
                name="base",
                num_steps=200,
                trains=("language_model",),
                data=DataConfig(mixture=(("arithmetic/train", 1.0),), batch_size=32, length=256),
                optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=20, schedule="linear"),
            ),
        ),
    )
