"""A small model learns sums, two of three from those who cannot carry: where alignment begins.

    l32jax train configs/arithmetic_base.py

On two CPU cores: three or four minutes. Two of three sums that it reads have every carry wrong, so
it knows how to carry, and seldom says so: about a third of the sums that it draws are right, and of
its likeliest answers hardly any. configs/arithmetic_rounds.py and configs/arithmetic_grpo.py go on
from there.
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
                num_steps=400,
                trains=("language_model",),
                data=DataConfig(
                    mixture=(("arithmetic/train", 0.35), ("arithmetic/careless", 0.65)),
                    batch_size=32,
                    length=256,
                ),
                optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=20, schedule="linear"),
            ),
        ),
    )
