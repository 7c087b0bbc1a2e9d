"""How 1B and 3B were made of larger models, and how all of the family were aligned.

Sources: "The Llama 3 Herd of Models", section 4 (text) and 7.5 (vision); the model cards of Llama
3.2. Of the distillation nothing is published but the teachers, and that it follows pruning: its
numbers are ours. Functions give stages; a config in configs/ is a chain of them.
"""

from l32jax.config import LlamaConfig, Part
from l32jax.objective_config import Distill, Dpo, Reward, Teacher
from l32jax.recipes import SEEING, TEXT_SHARES
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig

TEXT: tuple[Part, ...] = ("language_model",)


def distillation(
    data: DataConfig,
    how: Distill,
    *,
    num_steps: int,
    peak_lr: float = 3e-4,
    trains: tuple[Part, ...] = TEXT,
) -> StageConfig:
    """A pruned model learns from teachers. Ours: all numbers; the rate is torchtune's."""
    return StageConfig(
        name="distillation",
        num_steps=num_steps,
        trains=trains,
        data=data,
        objective=how,
        optimizer=OptimizerConfig(
            peak_lr=peak_lr,
            final_lr=peak_lr / 10,
            warmup_steps=max(num_steps // 100, 1),
            weight_decay=0.1,
        ),
    )


def sft(
    data: DataConfig,
    *,
    num_steps: int = 9000,
    peak_lr: float = 1e-5,
    trains: tuple[Part, ...] = TEXT,
) -> StageConfig:
    """Answers are learned, prompts are not. Published: the rate, 8,500 to 9,000 steps; the vision
    models train what sees, against the frozen trunk. Ours: the warm-up and the cosine."""
    return StageConfig(
        name="sft",
        num_steps=num_steps,
        trains=trains,
        data=data,
        optimizer=OptimizerConfig(
            peak_lr=peak_lr, warmup_steps=max(num_steps // 50, 1), weight_decay=0.1
        ),
    )


def reward_model(
    data: DataConfig,
    *,
    num_steps: int,
    peak_lr: float = 1e-5,
    trains: tuple[Part, ...] = TEXT,
    how: Reward = Reward(),  # noqa: B008  (frozen)
) -> StageConfig:
    """Published: the ranking loss without a margin; the vision model's squared rewards."""
    return StageConfig(
        name="reward",
        num_steps=num_steps,
        trains=(*trains, "reward_head"),
        data=data,
        objective=how,
        optimizer=OptimizerConfig(peak_lr=peak_lr, warmup_steps=max(num_steps // 50, 1)),
    )


def dpo(
    data: DataConfig,
    *,
    num_steps: int,
    peak_lr: float = 1e-5,
    trains: tuple[Part, ...] = TEXT,
    how: Dpo = Dpo(),  # noqa: B008  (frozen)
) -> StageConfig:
    """Published: the rate, beta 0.1, formatting tokens masked, the better answer's likelihood at
    0.2; vision: a reference that averages the policy. Ours: the warm-up and the cosine."""
    return StageConfig(
        name="dpo",
        num_steps=num_steps,
        trains=trains,
        data=data,
        objective=how,
        optimizer=OptimizerConfig(
            peak_lr=peak_lr, warmup_steps=max(num_steps // 50, 1), weight_decay=0.1
        ),
    )


def distilled(
    model: LlamaConfig, teachers: tuple[Teacher, ...], *, start_from: str, directory: str
) -> TrainConfig:
    """A text model of the family from its pruned parent, at full size, 4M tokens a step."""
    data = DataConfig(
        mixture=TEXT_SHARES,
        batch_size=512,
        length=8192,
        workers=8,
    )
    how = Distill(teachers=teachers, share=0.5)
    return TrainConfig(
        model=model,
        stages=(distillation(data, how, num_steps=100_000),),
        directory=directory,
        start_from=start_from,
        dtype="bfloat16",
        params="bfloat16",
        saved="attention",
        save_every=1000,
    )


def vision_aligned(model: LlamaConfig, *, start_from: str, directory: str) -> TrainConfig:
    """SFT and DPO of a vision model against its frozen trunk, text-only rows among the others.

    Published: what trains, DPO's numbers, a reference that averages the policy. Ours: rows, steps.
    """
    rows = DataConfig(
        mixture=(("data/visual_instructions", 0.8), ("data/text_instructions", 0.2)),
        batch_size=512,
        length=4096,
        max_images=8,
        vision_tiles=32,
        workers=8,
    )
    pairs = DataConfig(
        mixture=(("data/visual_preferences", 0.8), ("data/text_preferences", 0.2)),
        batch_size=512,
        length=4096,
        max_images=8,
        vision_tiles=32,
        max_pairs=16,
        workers=8,
    )
    how = Dpo(reference="ema", refresh_every=10)
    return TrainConfig(
        model=model,
        stages=(
            sft(rows, num_steps=12_000, trains=SEEING),
            dpo(pairs, num_steps=1_000, trains=SEEING, how=how),
        ),
        directory=directory,
        start_from=start_from,
        dtype="bfloat16",
        params="bfloat16",
        saved="attention",
        save_every=500,
    )
