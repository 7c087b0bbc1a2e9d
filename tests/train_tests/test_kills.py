"""Killed at random, again and again: the losses of a run that nothing stopped, to the last bit."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l32jax.config import MeshConfig
from l32jax.config_text import to_json
from l32jax.conversion.convert import save
from l32jax.data.tokenizer import Tokenizer
from l32jax.generate.model import Model
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.sharding import single_device_mesh
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import MODEL

ROOT = Path(__file__).parents[2]
NUM_STEPS = (24, 16)
KILLS = 10
TIMEOUT = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """Documents of several lengths, with no, one and three pictures."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (28 + 14 * (number % 3), 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with (folder / "documents.jsonl").open("w") as file:
        for number in range(40):
            pictures = [
                {"image": f"{(number + n) % 6}.png"} for n in (0, 1, 3)[: number % 3 * 2 - 1]
            ]
            text = f"number {number} " * int(rng.integers(1, 6))
            parts = [*(pictures if number % 3 else []), text]
            file.write(json.dumps({"parts": parts}) + "\n")
    return str(folder / "documents.jsonl")


@pytest.fixture(scope="module")
def beginning(tmp_path_factory) -> str:
    """A model to start from: to compile how random ones are made takes most of a start."""
    folder = str(tmp_path_factory.mktemp("beginning") / "model")
    mesh = single_device_mesh()
    save(Model(MODEL, random_params(MODEL, mesh), Tokenizer.bytes_only(), mesh), folder, to="orbax")
    return folder


def config_in(directory: Path, source: str, beginning: str) -> TrainConfig:
    """Two stages: packed rows, microbatches, a change of resolution, an average at the end."""

    def stage(name: str, num_steps: int, **changes) -> StageConfig:
        return StageConfig(
            name=name,
            num_steps=num_steps,
            trains=("vision_tower", "adapter"),
            data=DataConfig(
                mixture=((source, 1.0),),
                batch_size=4,
                length=128,
                max_images=4,
                vision_tiles=10,
                packing_rows=3,
            ),
            optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
            accumulate=2,
            **changes,
        )

    return TrainConfig(
        model=MODEL,
        stages=(
            stage("stage1", NUM_STEPS[0]),
            stage("stage2", NUM_STEPS[1], image_size=56, average="polyak", average_from=0.5),
        ),
        directory=str(directory),
        start_from=beginning,
        mesh=MeshConfig(data=-1, fsdp=1),
        save_every=5,
        log_every=1,
    )


class Run:
    """A run in processes of its own, which can be killed and started again."""

    def __init__(self, folder: Path, source: str, beginning: str, processes: int):
        folder.mkdir()
        self.metrics = folder / "run" / "metrics.jsonl"
        self._config, self._errors = folder / "config.json", folder / "errors.txt"
        self._config.write_text(to_json(config_in(folder / "run", source, beginning)))
        self._number = processes

    def start(self) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        places = [[str(port), str(i)] for i in range(self._number)] if self._number > 1 else [[]]
        with self._errors.open("a") as errors:
            return [
                subprocess.Popen(
                    [sys.executable, "-m", "tests.train_tests.kills_child", self._config, *place],
                    cwd=ROOT,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    stderr=errors,
                    stdout=errors,
                )
                for place in places
            ]

    def finish(self) -> None:
        for process in self.start():
            assert process.wait(TIMEOUT) == 0, self._errors.read_text()[-3000:]

    def kill_after(self, lines: int, more: float) -> bool:
        """Kills it `more` seconds after so many lines are told; False if it ended before that."""
        processes, told = self.start(), self._told()
        deadline = time.monotonic() + TIMEOUT
        while self._told() < told + lines and processes[0].poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(more)
        was_running = processes[0].poll() is None
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait(TIMEOUT)
        return was_running

    def losses(self) -> dict[tuple[str, int], float]:
        """The last word on every step."""
        lines = self.metrics.read_text().splitlines()
        told = [json.loads(line) for line in lines if line.endswith("}")]
        return {(line["stage"], line["step"]): line["loss"] for line in told if "loss" in line}

    def _told(self) -> int:
        return len(self.metrics.read_text().splitlines()) if self.metrics.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("processes", [1, 2])
def test_losses_of_a_run_killed_ten_times_are_those_of_one_never_stopped(
    processes, source, beginning, tmp_path
):
    whole = Run(tmp_path / "whole", source, beginning, processes)
    whole.finish()
    assert len(whole.losses()) == sum(NUM_STEPS)
    assert len(set(whole.losses().values())) == sum(NUM_STEPS)

    killed = Run(tmp_path / "killed", source, beginning, processes)
    chance = random.Random(processes)
    kills = sum(
        killed.kill_after(chance.randrange(0, 9), chance.random() / 10) for _ in range(KILLS)
    )
    assert kills == KILLS, "it ended too early to be killed as often"
    killed.finish()
    assert killed.losses() == whole.losses()
