"""Three rounds of sampling, verifying, SFT and DPO on sums, with a reward model of each round.

    l32jax train configs/arithmetic_base.py
    l32jax rounds configs/arithmetic_rounds.py

On two CPU cores: two or three minutes a round. Nothing but the model's own answers is learned from:
the verifier reads the last number. Preferences are learned up to a margin (IPO, of one nat):
without that they are pushed on where SFT has them right already, and what wrong answers say after a
wrong carry, "4 + 8 = 12", is right in itself, and would be unlearned.
"""

from dataclasses import replace

from l32jax.config import SamplingConfig
from l32jax.objective_config import Dpo, Reward
from l32jax.presets import TINY_TEXT
from l32jax.rounds_config import BEST, PAIRS, RoundsConfig
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig


def config() -> RoundsConfig:
    best = DataConfig(mixture=((BEST, 1.0),), batch_size=16, length=256)
    pairs = replace(best, mixture=((PAIRS, 1.0),), max_pairs=2)
    sft = StageConfig(
        name="sft",
        num_steps=10,
        trains=("language_model",),
        data=best,
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2),
    )
    dpo = replace(
        sft,
        name="dpo",
        num_steps=60,
        data=pairs,
        objective=Dpo(loss="ipo", beta=0.5),
        optimizer=OptimizerConfig(peak_lr=1e-4, warmup_steps=2),
    )
    reward = replace(
        dpo, name="reward", num_steps=200, trains=("language_model", "reward_head"),
        objective=Reward(), optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=5),
    )  # fmt: skip
    return RoundsConfig(
        run=TrainConfig(
            model=TINY_TEXT,
            stages=(sft, dpo),
            directory="runs/arithmetic_rounds",
            start_from="runs/arithmetic_base",
            show_every=1000,
        ),
        prompts=("arithmetic/train/0", "arithmetic/train/1", "arithmetic/train/2"),
        held_out="arithmetic/test",
        verifier="number",
        answers=8,
        rows=256,
        sampling=SamplingConfig(max_new_tokens=48, temperature=1.0, top_p=0.9),
        reward=reward,
    )
