"""A model with every kind of parameter and little to trace, and rows for it to learn."""

import dataclasses
from typing import Any

import numpy as np

from l32jax.config import LlamaConfig, Part
from l32jax.data.rows import Batch, VisionShape, make_row, stack
from l32jax.data.samples import Sample
from l32jax.presets import TINY_TEXT, TINY_VISION, with_vision
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig

assert TINY_VISION.vision is not None
MODEL = LlamaConfig(
    decoder=dataclasses.replace(TINY_VISION.decoder, num_groups=2, group_pattern=("self", "cross")),
    vision=dataclasses.replace(TINY_VISION.vision, num_local_layers=2, taps=(1,)),
)
TEXT = LlamaConfig(decoder=dataclasses.replace(TINY_TEXT.decoder, num_groups=1))
# What adapts to a text model: its own layers are within, bit for bit.
TINY_TEXT_SEEING = with_vision(
    TINY_TEXT, dataclasses.replace(TINY_VISION.vision, num_local_layers=1, taps=(0,)), every=2
)
IMAGE_ID = MODEL.decoder.vocab_size
LENGTH = 16
VISION = VisionShape.of(MODEL, max_images=1, max_tiles=4)


def rows(count: int, *, images: bool) -> Batch:
    """Tokens that follow each other, after a picture in every row but each third."""
    random = np.random.default_rng(0)
    made = []
    for index in range(count):
        tokens = [(index + step) % 256 for step in range(10)]
        pictures = []
        if images and index % 3:
            pictures = [random.integers(0, 256, (28 * (1 + index % 2), 28, 3), np.uint8)]
            tokens = [tokens[0], IMAGE_ID, *tokens[1:]]
        sample = Sample.single(tokens, [1.0] * len(tokens), pictures)
        made.append(make_row([sample], length=LENGTH, vision=VISION if images else None))
    return stack(made)


def stage(trains: tuple[Part, ...], num_steps: int = 8, **optimizer: Any) -> StageConfig:
    return StageConfig(
        name="small",
        num_steps=num_steps,
        trains=trains,
        data=DataConfig(mixture=(("none.jsonl", 1.0),), batch_size=4, length=LENGTH),
        optimizer=OptimizerConfig(**({"peak_lr": 1e-2} | optimizer)),
    )
