"""What a running stage shows: a few live lines on a terminal, and now and then a line elsewhere."""

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from l32jax.train.sparkline import sparkline

PLAIN_SECONDS = 10.0  # between lines where there is no terminal to draw on

Values = Mapping[str, float]


class View:
    """`show` returns at once: drawing is a thread's."""

    def __init__(self, name: str, num_steps: int, first_step: int, console: Console | None = None):
        self._name, self._num_steps = name, num_steps
        self._console = console or Console(stderr=True)
        self._told = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        self._task = self._progress.add_task(name, total=num_steps, completed=first_step, left="")
        self._live = Live(self._progress, console=self._console, transient=False)

    def start(self) -> None:
        if self._console.is_terminal:
            self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def show(self, step: int, values: Values, left: float, left_of_run: float) -> None:
        """`values` as they are recorded; seconds that are left of the stage and of the run."""
        eta = [f"{_duration(left)} left"] * (left > 0)
        eta += [f"{_duration(left_of_run)} of the run"] * (left_of_run > left)
        lines = [learning(values), speed(values), inside(values)]
        if self._console.is_terminal:
            self._progress.update(self._task, left=", ".join(eta))
            texts = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines if line]
            self._live.update(Group(self._progress, *texts))
        elif step == self._num_steps or time.monotonic() - self._told > PLAIN_SECONDS:
            self._told = time.monotonic()
            told = "  ".join(part for part in (*lines[:2], ", ".join(eta)) if part)
            # Not by rich, which would break the line where a terminal's width were.
            print(f"{self._name} {step}/{self._num_steps}  {told}", file=self._console.file)


def learning(values: Values) -> str:
    told = f"loss {values['loss']:.3f}  accuracy {values['accuracy']:.1%}"
    if "optim/learning_rate" in values:
        told += f"  rate {values['optim/learning_rate']:.2g}"
    if "optim/grad_norm" in values:
        told += f"  gradient {values['optim/grad_norm']:.2g}"
    return told


def speed(values: Values) -> str:
    """Nothing, until a step has been timed that compiled nothing."""
    if "perf/tokens_per_s" not in values:
        return ""
    parts = [f"{values['perf/tokens_per_s']:,.0f} tokens/s"]
    if values["perf/images_per_s"]:
        parts.append(f"{values['perf/images_per_s']:,.0f} images/s")
    if "perf/mfu" in values:
        parts.append(f"MFU {values['perf/mfu']:.1%}")
    else:
        parts.append(f"{values['perf/tflops_per_s'] * 1e3:,.1f} GFLOP/s")
    for name, title in (("data/wait", "data wait"), ("data/padding_text", "padding")):
        parts.append(f"{title} {values[name]:.0%}")
    if "perf/goodput" in values:
        parts.append(f"goodput {values['perf/goodput']:.0%}")
    return "  ".join(parts)


def inside(values: Values) -> str:
    """The attention gates of the cross layers, bottom to top, and what they let in."""
    gates = _all(values, "inside/attention_gate/")
    if not gates:
        return ""
    told = f"gates {sparkline([abs(gate) for gate in gates], len(gates), low=0.0)}"
    told += f" {min(gates):+.3f} to {max(gates):+.3f}"
    if shares := _all(values, "inside/residual_share/"):
        told += f"  images in the stream {max(shares):.1%} at most"
    return told


def _all(values: Values, prefix: str) -> list[float]:
    return [value for name, value in values.items() if name.startswith(prefix)]


def _duration(seconds: float) -> str:
    """90 s, 12 min, 3 h 05, 2 d 4 h"""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02}"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
