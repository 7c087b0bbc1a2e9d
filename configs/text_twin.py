"""The stages of configs/text_8b.py in miniature: pretraining, longer and longer rows, annealing.

    l32jax train configs/text_twin.py

On two CPU cores: two or three minutes. It shows the mechanics (rows that grow while tokens a step
stay, the constant rate in between, the line to zero, the average), on the questions of easy-VQA
without their pictures. Needs the extra `quickstart` for the data.
"""

from dataclasses import replace

from l32jax.config import RopeScaling
from l32jax.presets import TINY_TEXT
from l32jax.recipes import long_context, text_anneal, text_pretrain
from l32jax.run_config import DataConfig, TrainConfig

PEAK_LR = 4e-3
LENGTHS = (256, 512, 1024)


def config() -> TrainConfig:
    scaling = RopeScaling(factor=8.0, original_context=128)
    model = replace(TINY_TEXT, decoder=replace(TINY_TEXT.decoder, rope_scaling=scaling))
    data = DataConfig(
        mixture=(("easy-vqa/train", 0.5), ("easy-vqa/train/reasoned", 0.5)),
        batch_size=32,
        length=128,
    )
    last = replace(data, length=LENGTHS[-1], batch_size=4)
    return TrainConfig(
        model=model,
        stages=(
            text_pretrain(data, num_steps=120, peak_lr=PEAK_LR, warmup_steps=10),
            *long_context(data, num_steps=20, learning_rate=PEAK_LR / 100, lengths=LENGTHS),
            text_anneal(last, num_steps=20, peak_lr=PEAK_LR / 100),
        ),
        directory="runs/text_twin",
        save_every=100,
    )
