"""A stage that trains the adapter beside a frozen encoder, and documents for it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from tests.train_tests.small import MODEL

PICTURES = 40  # of which two are not to be decoded


def write_documents(folder: Path) -> str:
    """Of several lengths, with no, one, two and three pictures of one to four tiles."""
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        shape = (20 + 14 * (number % 3), 20 + 10 * (number % 4), 3)
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(path)
        if number in (7, 30):
            path.write_bytes(path.read_bytes()[:-40])
    with (folder / "documents.jsonl").open("w") as file:
        for number in range(60):
            shown = [{"image": f"{(number + n) % PICTURES}.png"} for n in range(number % 4)]
            words = f"number {number} " * (1 + number % 4)
            file.write(json.dumps({"parts": [*shown, words]}) + "\n")
    return str(folder / "documents.jsonl")


def config(source: str, features: str | None, directory: str = "", **data) -> TrainConfig:
    stage = StageConfig(
        name="adapter",
        num_steps=4,
        trains=("adapter",),
        data=DataConfig(
            mixture=((source, 1.0),),
            batch_size=8,
            length=128,
            max_images=4,
            vision_tiles=10,
            packing_rows=3,
            max_bad=0.1,
            features=features,
            **data,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-2),
    )
    return TrainConfig(model=MODEL, stages=(stage,), directory=directory, log_every=1, show_every=2)
