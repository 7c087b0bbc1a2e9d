"""The verbs about runs: train one, list them, look at a config, verify what was saved.

Only training imports jax.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from l32jax.checkpoint import steps
from l32jax.checkpoint.engine import manifest
from l32jax.cli import INTERRUPTED, listing
from l32jax.config_text import override, to_json
from l32jax.errors import InputError
from l32jax.run_config import TrainConfig
from l32jax.train.run_folder import METRICS, find, see

File = Annotated[Path, arg(metavar="CONFIG.py")]
Overrides = Annotated[tuple[str, ...], arg(metavar="[FIELD=VALUE ...]", help_behavior_hint="")]


def train(config: File, overrides: Overrides = (), /) -> int:
    """Trains what a config file describes, or goes on with it.

    The file is Python, and has a function `config()` that returns a TrainConfig. A run that was
    interrupted (exit code 75) goes on where it was saved when the same command is given again.
    On a cluster the same command is given in every process: docs/launch.md.

    Examples:
      l32jax train configs/easy_vqa_tiny.py
      l32jax train my_run.py directory=runs/second stages.0.num_steps=100 seed=1

    Args:
      config: the file.
      overrides: fields to change, such as stages.0.optimizer.peak_lr=1e-4.
    """
    chosen = read_config(config, overrides)

    def run() -> None:
        from l32jax import cluster

        cluster.join()
        import jax

        from l32jax import api

        api.run(chosen)
        if jax.process_index() == 0:
            print(f"The trained model is in {chosen.directory}: give that as --model.")

    return _interruptible(run)


def quickstart(*, directory: Path = Path("runs/quickstart"), seed: int = 0) -> int:
    """Trains a tiny vision model here and now, and asks it.

    Examples:
      l32jax quickstart
      l32jax quickstart --directory runs/another --seed 1

    Args:
      directory: where the run is kept; started again, it goes on from there.
      seed: of the first parameters and the order of the data.
    """

    def run() -> None:
        from l32jax import quickstart

        quickstart.run(directory, seed=seed)

    return _interruptible(run)


def list_runs(
    directory: Annotated[Path, arg(metavar="DIR")] = Path("runs"), /, *, json: bool = False
) -> int:
    """Lists the runs below a folder: how far they are, how they do, and whether they are alive.

    The status is running, finished, stopped (it was asked to, and has saved) or crashed. Goodput is
    the share of the time since a run began in which it learned.

    Examples:
      l32jax runs
      l32jax runs /data/experiments --json

    Args:
      directory: where to look, to a depth of four.
      json: as a JSON object a line.
    """
    if not directory.is_dir():
        raise InputError(f"runs in {str(directory)!r}: no such folder; give one with runs in it")
    runs = [see(path) for path in find(directory)]
    for run in runs:
        if run.damaged:
            lines = "a line is" if run.damaged == 1 else f"{run.damaged} lines are"
            print(f"l32jax: {run.path / METRICS}: {lines} damaged and left out", file=sys.stderr)
    listing.print_json(runs) if json else listing.print_table(runs, directory)
    return 0


def show_config(config: File, overrides: Overrides = (), /) -> int:
    """Prints the config that a run would have, as JSON.

    Examples:
      l32jax config show my_run.py
      l32jax config show my_run.py stages.0.num_steps=100

    Args:
      config: a Python file with a function `config()` that returns a TrainConfig.
      overrides: fields to change, such as stages.0.optimizer.peak_lr=1e-4.
    """
    print(to_json(read_config(config, overrides)))
    return 0


def verify(path: Annotated[Path, arg(metavar="PATH")], /) -> int:
    """Verifies every byte of a checkpoint by its digests.

    The exit code is 1 if something is missing or not as it was written. A checkpoint in another
    format has digests if l32jax wrote it, in its manifest.json.

    Examples:
      l32jax checkpoint verify runs/quickstart
      l32jax checkpoint verify Llama-3.2-1B.gguf

    Args:
      path: of a run, of one of its stages, or of a converted checkpoint.
    """
    if not path.exists():
        raise InputError(f"checkpoint {str(path)!r}: no such file or folder here; check the path")
    stages = [child for child in sorted(path.glob("*")) if steps.is_store(child)]
    if not stages and not steps.is_store(path) and (listing := manifest.manifest_of(path)):
        problems = manifest.problems(listing)
    else:
        problems = [f"{stage}, {p}" for stage in stages or [path] for p in steps.verify(stage)]
    print("\n".join(problems) or f"{path}: every byte is as it was written")
    return 1 if problems else 0


def read_config(path: Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """What `config()` of a Python file returns, with fields changed. The file is executed."""
    if not path.is_file():
        raise InputError(f"config {str(path)!r}: no such file; give a Python file with config()")
    config = execute(path)
    if not isinstance(config, TrainConfig):
        raise InputError(f"config() in {path}: gives {type(config).__name__}, not a TrainConfig")
    for assignment in overrides:
        config = override(config, assignment)
    return config


def execute(path: Path) -> object:
    """What `config()` of a Python file returns, whatever it is."""
    spec = importlib.util.spec_from_file_location("l32jax_run_config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {str(path)!r}: its name does not end with .py; rename it")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.config()
    except Exception as error:  # noqa: BLE001  (what the user's code raises can be anything)
        why = error if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"config in {path}: {why}; correct the file") from error


def _interruptible(run: Callable[[], None]) -> int:
    from l32jax.train.loop import Interrupted

    try:
        run()
    except Interrupted as interruption:
        print(f"l32jax: {interruption}", file=sys.stderr)
        return INTERRUPTED
    return 0
