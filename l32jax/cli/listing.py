"""Runs as a table, or as lines of JSON."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from l32jax.train.run_folder import Seen
from l32jax.train.sparkline import sparkline

PIPED_WIDTH = 250  # whole paths, for those who search in them
COLORS = {"running": "green", "finished": "blue", "stopped": "yellow", "crashed": "red"}


def print_table(runs: Sequence[Seen], directory: Path) -> None:
    if not runs:
        print(f"no runs below {directory}")
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("run", "model", "stage", "step", "status", "loss", "", "goodput", "heard of"):
        table.add_column(title, no_wrap=True, justify="right" if title == "step" else "left")
    for run in runs:
        table.add_row(*_cells(run, directory))
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table)


def print_json(runs: Sequence[Seen]) -> None:
    """Every field but the curve, of which it has the last loss."""
    for run in runs:
        record = dataclasses.asdict(run) | {"path": str(run.path), "loss": _last(run.losses)}
        del record["losses"]
        print(json.dumps(record))


def _cells(run: Seen, directory: Path) -> tuple[str | Text, ...]:
    loss = _last(run.losses)
    name = str(run.path if run.path == directory else run.path.relative_to(directory))
    return (
        Text(name),
        Text(run.model or "-"),
        Text(_stage(run)),
        _step(run),
        Text(run.status, style=COLORS.get(run.status, "")),
        "-" if loss is None else f"{loss:.4g}",
        sparkline(run.losses, 12),
        "-" if run.goodput is None else f"{run.goodput:.0%}",
        "-" if run.heard is None else _age(time.time() - run.heard),
    )


def _stage(run: Seen) -> str:
    if run.stage is None:
        return run.stage_name or "-"
    number, count = run.stage
    return f"{number}/{count} {run.stage_name}"


def _step(run: Seen) -> str:
    if run.step is None:
        return "-"
    done, total = run.step
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def _last(losses: Sequence[float]) -> float | None:
    return losses[-1] if losses else None


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
