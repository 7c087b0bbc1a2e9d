"""The sums of configs/arithmetic_base.py by GRPO: the verifier's rewards, and nothing else.

    l32jax train configs/arithmetic_base.py
    l32jax train configs/arithmetic_grpo.py

On two CPU cores: some minutes.
"""

from l32jax.objective_config import Grpo
from l32jax.presets import TINY_TEXT
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=TINY_TEXT,
        directory="runs/arithmetic_grpo",
        start_from="runs/arithmetic_base",
        show_every=1000,
        stages=(
            StageConfig(
                name="grpo",
                num_steps=60,
                trains=("language_model",),
                data=DataConfig(mixture=(("arithmetic/train", 1.0),), batch_size=64, length=256),
                objective=Grpo(prompts=64, answers=8, verifier="number", max_new_tokens=48),
                optimizer=OptimizerConfig(peak_lr=3e-4, schedule="constant"),
            ),
        ),
    )
