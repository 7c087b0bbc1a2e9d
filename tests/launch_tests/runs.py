"""A run that is small enough to be launched for a test, and what it said of its steps."""

import json
from pathlib import Path

NUM_STEPS = 120
CONFIG = f"""
from dataclasses import replace
from pathlib import Path

from l32jax.config import LlamaConfig, MeshConfig
from l32jax.presets import TINY_TEXT
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig

HERE = Path(__file__).parent


def config() -> TrainConfig:
    stage = StageConfig(
        name="text",
        num_steps={NUM_STEPS},
        trains=("language_model",),
        data=DataConfig(mixture=((str(HERE / "documents.jsonl"), 1.0),), batch_size=4, length=64),
        optimizer=OptimizerConfig(peak_lr=1e-2),
    )
    return TrainConfig(
        model=LlamaConfig(decoder=replace(TINY_TEXT.decoder, num_groups=1)),
        stages=(stage,),
        directory=str(HERE / "run"),
        mesh=MeshConfig(data=-1, fsdp=1),
        log_every=1,
    )
"""


def write_run(folder: Path, config: str = CONFIG) -> None:
    """Its config.py and data."""
    (folder / "config.py").write_text(config)
    with (folder / "documents.jsonl").open("w") as file:
        for number in range(40):
            text = f"number {number} " * (number % 7 + 1)
            file.write(json.dumps({"parts": [text]}) + "\n")


def losses(run: Path) -> dict[int, float]:
    """The last word on every step, in a run's folder; empty before the first."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    told = [json.loads(line) for line in lines if line.endswith("}\n")]
    return {line["step"]: line["loss"] for line in told if "loss" in line}
