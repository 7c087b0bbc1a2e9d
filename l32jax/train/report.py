"""What a running stage tells: numbers in JSON lines and TensorBoard, pictures, and a live view."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from l32jax.data.tokenizer import Tokenizer
from l32jax.model.parameters import Params
from l32jax.run_config import TrainConfig
from l32jax.sharding import row_share
from l32jax.train import examples, goodput, inside, journal
from l32jax.train.bad_steps import Judge
from l32jax.train.flops import Counts
from l32jax.train.hosts import Hosts
from l32jax.train.run_folder import METRICS
from l32jax.train.speed import Speed, full_step
from l32jax.train.view import View

# Loss and accuracy stand by themselves; what else a step returns is put below one of these.
GROUPS = {
    "grad_norm": "optim",
    "learning_rate": "optim",
    "bad": "optim",
    "skipped": "optim",
    "weight": "data",
}


class _Step(NamedTuple):
    """A step on its way: how many there are with it, what it returns, and what was in it."""

    number: int
    metrics: Mapping[str, Any]
    gates: Mapping[str, Array]
    counts: Counts
    waited: float

    def is_done(self) -> bool:
        return self.metrics["loss"].is_ready()


class Report:
    """Called once a step, with the batch on the host and the metrics still on the devices.

    A step is waited for when the next one has been dispatched: devices always have one to do, and
    the time between two ends is a step's. Data was waited for if the devices had come to an end
    when it came; then all of the wait counts, which is at most what it cost. Speeds count what
    was learned from: tokens that see something, and images that are there. Every process reports;
    the first one writes.

    Args:
      config: of the run; its model is this stage's.
      number, first_step: of the stage, and how many of its steps are done.
      clock: of the run's goodput.
      judge: of bad steps; what it raises comes from where a step is reported, or saved.
    """

    def __init__(
        self,
        config: TrainConfig,
        number: int,
        first_step: int,
        *,
        clock: goodput.Clock,
        mesh: Mesh,
        tokenizer: Tokenizer,
        judge: Judge | None = None,
    ):
        self._judge = judge
        self._config, self._stage = config, config.stages[number]
        self._number, self._first_step = number, first_step
        self._clock, self._tokenizer = clock, tokenizer
        self._under_way: _Step | None = None
        self._untold: _Step | None = None
        self._unjudged: _Step | None = None
        self._ended = self._waited = 0.0
        self._looks: dict[str, float] = {}  # of the last look
        self._untold_looks: dict[str, float] = {}
        self._speed = Speed(config.model, self._stage, mesh.size, mesh.devices.flat[0].device_kind)
        self._hosts = Hosts(Path(config.directory))
        self._own_seconds, self._own_steps, self._waited_last = 0.0, 0, 0.0
        self._probe = inside.make_probe(config, mesh)
        self._writing = jax.process_index() == 0
        _, self._shares = row_share(mesh)

    def __enter__(self) -> "Report":
        self._clock.enter(self._number, self._first_step)
        if self._writing:
            from tensorboardX import SummaryWriter  # imports torch, where that is: two seconds

            directory = Path(self._config.directory)
            directory.mkdir(parents=True, exist_ok=True)
            self._lines = journal.open_to_append(directory / METRICS)
            self._board = SummaryWriter(
                str(directory / "tensorboard" / self._stage.name), purge_step=self._first_step + 1
            )
            self._view = View(self._stage.name, self._stage.num_steps, self._first_step)
            self._view.start()
        return self

    def __exit__(self, kind, *_) -> None:
        with suppress(jax.errors.JaxRuntimeError) if kind else nullcontext():
            self._wait()
            self._tell()
        self._clock.switch("unproductive_checkpoint_save_time")  # its end is waited for now
        if self._writing:
            self._view.stop()
            self._board.close()
            self._lines.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what gets the next batch."""
        begin = time.monotonic()
        yield
        if self._under_way is None or self._under_way.is_done():
            self._wait(ended=begin)
            self._waited = time.monotonic() - begin
            self._clock.move(self._waited, "data_loading_sync")
        if not self._ended:
            self._clock.switch("program_startup")

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around what saves the state; that is no step's time."""
        with self._pausing("unproductive_checkpoint_save_time"):
            self._judge_ended()
            yield

    def __call__(
        self,
        index: int,
        batch: Mapping[str, np.ndarray],
        metrics: Mapping[str, Any],
        *,
        placed: Mapping[str, Array],
        params: Params,
    ) -> None:
        """Step `index` is on its way to the devices; these are its batch there, and its result."""
        done = index + 1
        counts = Counts.of(batch, shares=self._shares)
        gates = inside.gates(params) if self._is_due(done, self._config.log_every) else {}
        step = _Step(done, metrics, gates, counts, self._waited)
        self._waited = 0.0
        self._wait()
        self._tell()
        self._under_way = step
        self._judge_ended()
        if self._is_due(done, self._config.show_every):
            with self._pausing("custom_badput_events"):
                self._look_inside(done, batch, placed, params)
                self._compare_hosts(step)

    def _is_due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self._stage.num_steps

    def _wait(self, ended: float | None = None) -> None:
        """Until the step that is under way has ended, which may be known."""
        if self._under_way is None:
            return
        step, self._under_way = self._under_way, None
        if self._waited_last:
            self._own_seconds += time.monotonic() - self._waited_last
            self._own_steps += 1
        jax.block_until_ready(step.metrics)
        self._waited_last = time.monotonic()
        ended = time.monotonic() if ended is None else ended
        if self._ended:
            self._speed.add(ended - self._ended, step.waited, step.counts)
        self._ended, self._untold, self._unjudged = ended, step, step
        self._clock.switch("step")
        last = step.number == self._stage.num_steps
        self._clock.reached(self._number, step.number, last=last)

    def _judge_ended(self) -> None:
        """Not as soon as a step has ended, but where all processes have come equally far."""
        step, self._unjudged = self._unjudged, None
        if step is not None and self._judge is not None:
            self._judge(step.number, step.metrics)

    @contextmanager
    def _pausing(self, bucket: goodput.Spent) -> Iterator[None]:
        self._wait()
        with self._clock.spending(bucket):
            yield
        self._ended = time.monotonic()
        self._waited_last = self._ended

    def _tell(self) -> None:
        """What has ended and is untold."""
        step, self._untold = self._untold, None
        if step is None or not self._writing:
            return
        self._view.advance(step.number)
        if not self._is_due(step.number, self._config.log_every):
            return
        metrics, gates = jax.device_get((step.metrics, step.gates))
        values = {_grouped(name): float(value) for name, value in metrics.items()}
        values |= self._speed.take()
        values |= inside.gate_scalars(gates, self._config.model.decoder)
        values |= self._untold_looks
        self._untold_looks = {}
        values |= self._judge.counts() if self._judge else {}
        values["perf/goodput"] = self._clock.so_far().share
        self._write(step.number, values)
        self._view.show(step.number, self._looks | values, *self._seconds_left(step.number))

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        record = {"stage": self._stage.name, "step": step, "time": time.time(), **values}
        journal.append(self._lines, record)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _seconds_left(self, done: int) -> tuple[float, float]:
        """Of the stage, and of the run if later stages' operations take as long as this one's."""
        seconds = self._speed.step_seconds
        left = (self._stage.num_steps - done) * seconds
        pace = seconds / full_step(self._config.model, self._stage)
        later = self._config.stages[self._number + 1 :]
        costs = (stage.num_steps * full_step(self._config.model, stage) for stage in later)
        return left, left + pace * sum(costs)

    def _look_inside(
        self,
        step: int,
        batch: Mapping[str, np.ndarray],
        placed: Mapping[str, Array],
        params: Params,
    ) -> None:
        model = self._config.model
        chosen = examples.choose(batch, model.vision, max_places=inside.PLACES)
        asked = examples.asked_places(chosen, (len(batch["tokens"]), inside.PLACES))
        looked = examples.looking_places(batch, inside.PLACES)
        found = self._probe(params, dict(placed), looked, asked)
        if not self._writing:
            return
        if found.looks is not None:
            self._looks = self._untold_looks = inside.look_scalars(found.looks, model.decoder)
        for number, example in enumerate(chosen):
            self._show(step, f"examples/{number}", example, batch, found.likeliest)

    def _compare_hosts(self, step: _Step) -> None:
        own = self._own_seconds / max(self._own_steps, 1)
        self._own_seconds, self._own_steps = 0.0, 0
        whole, loss = self._speed.step_seconds, step.metrics["loss"]
        found = self._hosts.compare(step.number, own, whole, loss)
        self._untold_looks = self._untold_looks | found

    def _show(
        self,
        step: int,
        name: str,
        example: examples.Example,
        batch: Mapping[str, np.ndarray],
        likeliest: np.ndarray,
    ) -> None:
        told = examples.tell(example, batch, likeliest, self._tokenizer)
        self._board.add_text(name, examples.as_markdown(told), step)
        if image := examples.picture(example, batch):
            board_image = examples.captioned(image, told)
            self._board.add_image(name, board_image, step, dataformats="HWC")


def _grouped(name: str) -> str:
    group = GROUPS.get(name.partition("/")[0])
    return name if group is None else f"{group}/{name}"
