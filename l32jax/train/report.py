"""What a running stage tells: a progress bar, TensorBoard scalars, and one JSON line a record."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from l32jax.config import TrainConfig

PLAIN_SECONDS = 10.0  # between lines where there is no terminal to draw on


class Report:
    """Called once a step with the batch on the host and the metrics still on the devices.

    Metrics are read when the next step has been dispatched, so that devices never wait for it.
    Speeds count what was learned from: tokens that see something, and images that are there.
    """

    def __init__(self, config: TrainConfig, number: int, first_step: int):
        self._stage = config.stages[number]
        self._log_every = config.log_every
        self._pending: tuple[int, Any] | None = None
        self._tokens = self._images = 0
        self._since = self._told = time.monotonic()
        self._logging = jax.process_index() == 0
        if not self._logging:
            return
        from tensorboardX import SummaryWriter  # imports torch, where that is: two seconds

        directory = Path(config.directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._lines = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        self._scalars = SummaryWriter(str(directory / "tensorboard" / self._stage.name))
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            self._stage.name, total=self._stage.num_steps, completed=first_step, told=""
        )

    def __enter__(self) -> "Report":
        if self._logging:
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        if not self._logging:
            return
        self._flush()
        self._progress.stop()
        self._scalars.close()
        self._lines.close()

    def __call__(self, index: int, batch: dict[str, np.ndarray], metrics: Any) -> None:
        """Step `index` is on its way to the devices."""
        if not self._logging:
            return
        self._tokens += int(np.sum(batch["stop"] > batch["start"])) * jax.process_count()
        if "aspect" in batch:
            self._images += int(np.sum(batch["aspect"].prod(axis=-1) > 0)) * jax.process_count()
        self._flush()
        if (index + 1) % self._log_every == 0 or index + 1 == self._stage.num_steps:
            self._pending = index + 1, metrics
        self._progress.update(self._task, completed=index + 1)

    def _flush(self) -> None:
        """Tells what was left to tell; this waits for the step that it tells of."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        values |= {"tokens_per_s": self._tokens / seconds, "images_per_s": self._images / seconds}
        self._tokens = self._images = 0
        self._lines.write(json.dumps({"stage": self._stage.name, "step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._scalars.add_scalar(name, value, step)
        self._tell(step, values, now)

    def _tell(self, step: int, values: dict[str, float], now: float) -> None:
        told = (
            f"loss {values['loss']:.3f}  accuracy {values['accuracy']:.1%}  "
            f"{values['tokens_per_s']:,.0f} tokens/s"
        )
        if values["images_per_s"]:
            told += f"  {values['images_per_s']:,.0f} images/s"
        self._progress.update(self._task, told=told)
        last = step == self._stage.num_steps
        if not self._console.is_terminal and (last or now - self._told > PLAIN_SECONDS):
            self._told = now
            left = self._progress.tasks[0].time_remaining
            eta = "" if left is None or last else f"  {left:.0f} s left"
            self._console.print(
                f"{self._stage.name} {step}/{self._stage.num_steps}  {told}{eta}", highlight=False
            )
