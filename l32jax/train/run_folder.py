"""What a run keeps in its folder beside its checkpoints, for those who look on.

    <run>/run.json         the model's name, the stages, the whole config
    <run>/metrics.jsonl    a line of numbers every few steps
    <run>/goodput.jsonl    where the time went
    <run>/heartbeat.json   whether somebody is at work
    <run>/tensorboard/     the numbers again, and pictures
    <run>/lock             one trainer at a time

Reading needs no JAX. After a restart steps are done, and told of, again: the last word counts.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l32jax.checkpoint.engine import locks
from l32jax.config import LlamaConfig
from l32jax.presets import PRESETS
from l32jax.run_config import TrainConfig
from l32jax.train import goodput, heartbeat, journal

RUN, METRICS = "run.json", "metrics.jsonl"
MAX_DEPTH = 4  # of folders in which runs are looked for


@contextmanager
def at_work(
    config: TrainConfig, *, writing: bool, stopped_by: type[BaseException]
) -> Iterator[goodput.Clock]:
    """The time of a run from here on; says how it ended. Only one process of a run is `writing`.

    InputError while another process trains in the folder.

    Args:
      stopped_by: what is raised when a run was asked to stop, and has saved.
    """
    if not writing:
        yield goodput.Clock(None)
        return
    directory = Path(config.directory)
    with locks.take(directory, f"run in {directory}"):
        _describe(config, directory)
        clock, beats = goodput.Clock(directory), heartbeat.Heartbeat(directory)
        ending: heartbeat.Ending = "crashed"
        try:
            yield clock
            ending = "finished"
            if clock.entered:
                print(clock.so_far(), file=sys.stderr)
        except (KeyboardInterrupt, stopped_by):
            ending = "stopped"
            raise
        finally:
            clock.close()
            beats.end(ending)


def _describe(config: TrainConfig, directory: Path) -> None:
    stages = [{"name": stage.name, "num_steps": stage.num_steps} for stage in config.stages]
    run = {"model": _name_of(config.model), "stages": stages, "config": dataclasses.asdict(config)}
    temporary = directory / f"{RUN}.new"
    temporary.write_text(json.dumps(run, indent=2))
    os.replace(temporary, directory / RUN)


def _name_of(model: LlamaConfig) -> str:
    for name, config in PRESETS.items():
        if dataclasses.replace(model, compat=config.compat) == config:
            return name
    kind = "text" if model.vision is None else "vision"
    return f"{kind} {model.decoder.num_layers} x {model.decoder.embed_dim}"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A run as its folder shows it; None of what is not there.

    Attributes:
      stage: (number of the present one, from 1; how many there are).
      step: (how many of the stage are done and told of; how many it has).
      losses: of the whole run, in order, each step once.
      heard: when the process was last heard of, in seconds since 1970.
      damaged: lines of metrics that could not be read.
    """

    path: Path
    model: str | None
    stage_name: str | None
    stage: tuple[int, int] | None
    step: tuple[int, int | None] | None
    status: heartbeat.Status
    losses: list[float]
    goodput: float | None
    heard: float | None
    damaged: int


def find(directory: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """The folders of runs at or below this one, by name. Links are not followed."""
    if is_run(directory):
        yield directory
    elif depth:
        with os.scandir(directory) as entries:
            folders = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        for name in sorted(folders):
            if not name.startswith("."):
                yield from _find_readable(directory / name, depth - 1)


def _find_readable(directory: Path, depth: int) -> Iterator[Path]:
    try:
        yield from find(directory, depth)
    except PermissionError:
        return


def is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (RUN, METRICS))


def see(directory: Path) -> Seen:
    """What the files say that are there, whoever wrote them."""
    run = heartbeat.read_object(directory / RUN)
    stages = _stages(run.get("stages"))
    lines = journal.read(directory / METRICS)
    told = list(without_repeats(lines.records))
    last = told[-1] if told else {}
    names = [name for name, _ in stages]
    number = names.index(last["stage"]) if last.get("stage") in names else None
    beat, time_spent = heartbeat.read(directory), goodput.read(directory)
    model = run.get("model")
    return Seen(
        path=directory,
        model=model if isinstance(model, str) else None,
        stage_name=last.get("stage"),
        stage=None if number is None else (number + 1, len(stages)),
        step=(last["step"], None if number is None else stages[number][1]) if last else None,
        status=beat.status,
        losses=[float(line["loss"]) for line in told if _is_number(line.get("loss"))],
        goodput=time_spent.share if time_spent.seconds else None,
        heard=beat.time or _changed(directory / METRICS),
        damaged=lines.damaged,
    )


def without_repeats(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of (stage, step) in order; what was told of again, or undone by a restart, goes."""
    kept: list[dict[str, Any]] = []
    began: dict[str, int] = {}
    for record in records:
        stage, step = record.get("stage"), record.get("step")
        if not isinstance(stage, str) or type(step) is not int:
            continue
        order = began.setdefault(stage, len(began))
        while kept and (began[kept[-1]["stage"]], kept[-1]["step"]) >= (order, step):
            kept.pop()
        kept.append(record)
    return kept


def _stages(found: Any) -> list[tuple[str, int]]:
    if not isinstance(found, list):
        return []
    stages = [stage for stage in found if isinstance(stage, dict)]
    pairs = [(stage.get("name"), stage.get("num_steps")) for stage in stages]
    return [(n, s) for n, s in pairs if isinstance(n, str) and type(s) is int]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _changed(path: Path) -> float | None:
    return path.stat().st_mtime if path.is_file() else None
