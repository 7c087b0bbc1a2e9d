"""Llama 3.1 8B in the order of the paper: pretraining, six long-context stages, annealing.

    l32jax train configs/text_8b.py

Data: folders made by `l32jax data prepare`, see docs/data.md; the shares are the paper's. Hardware:
a pod; nothing of this size was run here (the twin, configs/text_twin.py, is the same recipe and
runs on two CPU cores). 16M tokens a step, as the paper ends with; its smaller steps at the
beginning are left out.
"""

from dataclasses import replace

from l32jax.presets import LLAMA3_1_8B
from l32jax.recipes import LONG_LENGTHS, long_context, text_anneal, text_pretrain
from l32jax.run_config import DataConfig, TrainConfig

PEAK_LR = 3e-4


def config() -> TrainConfig:
    data = DataConfig(
        mixture=(
            ("data/general", 0.50),
            ("data/reasoning", 0.25),
            ("data/code", 0.17),
            ("data/multilingual", 0.08),
        ),
        batch_size=2048,
        length=8192,
        workers=8,
    )
    long = replace(data, mixture=(*data.mixture, ("data/long_documents", 0.25)))
    last = replace(long, length=LONG_LENGTHS[-1], batch_size=16)  # 2M tokens a step
    annealing = replace(last, mixture=(*long.mixture, ("data/high_quality", 0.5)))
    return TrainConfig(
        model=LLAMA3_1_8B,
        stages=(
            text_pretrain(data, num_steps=900_000, peak_lr=PEAK_LR),
            *long_context(long, num_steps=8_000, learning_rate=PEAK_LR / 100),
            text_anneal(annealing, num_steps=20, peak_lr=PEAK_LR / 100),
        ),
        directory="runs/text_8b",
        tokenizer="checkpoints/Llama-3.1-8B/tokenizer.model",
        dtype="bfloat16",
        params="bfloat16",
        saved="attention",
        save_every=1000,
    )
