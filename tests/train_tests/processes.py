"""Runs in processes of their own, which can be signalled, killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from l32jax.config import MeshConfig
from l32jax.config_text import to_json
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from tests.train_tests.small import MODEL, TEXT

ROOT = Path(__file__).parents[2]
TIMEOUT = 240
NUM_STEPS = (24, 16)
CONFIG = """
from pathlib import Path
from l32jax.config_text import from_json
from l32jax.run_config import TrainConfig

def config():
    return from_json(TrainConfig, Path({json!r}).read_text())
"""


def config_in(directory: Path, source: str, beginning: str) -> TrainConfig:
    """Two stages: packed rows, microbatches, a change of resolution, an average at the end."""

    def stage(name: str, num_steps: int, **changes) -> StageConfig:
        return StageConfig(
            name=name,
            num_steps=num_steps,
            trains=("vision_tower", "adapter"),
            data=DataConfig(
                mixture=((source, 1.0),),
                batch_size=8,
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


def text_in(directory: Path, source: str, **changes: Any) -> TrainConfig:
    """One stage of a small text model, which compiles in seconds and takes many short steps."""
    stage = StageConfig(
        name="text",
        num_steps=100,
        trains=("language_model",),
        data=DataConfig(mixture=((source, 1.0),), batch_size=8, length=32, packing_rows=3),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
    )
    given: dict[str, Any] = {"mesh": MeshConfig(data=-1, fsdp=1), "save_every": 20, "log_every": 1}
    return TrainConfig(model=TEXT, stages=(stage,), directory=str(directory), **(given | changes))


class Run:
    """A run of the command line, in as many processes as each start says."""

    def __init__(self, folder: Path, config: TrainConfig):
        folder.mkdir()
        self.directory = Path(config.directory)
        self._metrics = self.directory / "metrics.jsonl"
        self._config, self.errors = folder / "config.py", folder / "errors.txt"
        (folder / "config.json").write_text(to_json(config))
        self._config.write_text(CONFIG.format(json=str(folder / "config.json")))

    def start(self, count: int, *changes: str) -> list[subprocess.Popen]:
        """The processes; `changes` are FIELD=VALUE of the config, or NAME=VALUE for the child."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environ = os.environ | {"JAX_PLATFORMS": "cpu"}
        child = [sys.executable, "-m", "tests.train_tests.kills_child"]
        with self.errors.open("a") as errors:
            return [
                subprocess.Popen(
                    [*child, str(port), str(number), str(count), self._config, *changes],
                    cwd=ROOT,
                    env=environ,
                    stderr=errors,
                    stdout=errors,
                )
                for number in range(count)
            ]

    def finish(self, count: int, *changes: str) -> None:
        assert self.codes(self.start(count, *changes)) == [0] * count, self.told()[-3000:]

    def codes(self, processes: list[subprocess.Popen]) -> list[int]:
        try:
            return [process.wait(TIMEOUT) for process in processes]
        finally:
            for process in processes:
                process.kill()

    def wait_for_lines(self, more: int, processes: list[subprocess.Popen]) -> bool:
        """Until so many more steps are told of; False if the run ended before that."""
        told, deadline = self._lines(), time.monotonic() + TIMEOUT
        while self._lines() < told + more and processes[0].poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return processes[0].poll() is None

    def kill_after(self, lines: int, more: float, count: int) -> bool:
        """Kills all, `more` seconds after so many lines; False if it ended before that."""
        processes = self.start(count)
        self.wait_for_lines(lines, processes)
        time.sleep(more)
        was_running = processes[0].poll() is None
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait(TIMEOUT)
        return was_running

    def losses(self) -> dict[tuple[str, int], float]:
        """The last word on every step."""
        lines = self._metrics.read_text().splitlines()
        told = [json.loads(line) for line in lines if line.endswith("}")]
        return {(line["stage"], line["step"]): line["loss"] for line in told if "loss" in line}

    def told(self) -> str:
        return self.errors.read_text()

    def _lines(self) -> int:
        return len(self._metrics.read_text().splitlines()) if self._metrics.exists() else 0
