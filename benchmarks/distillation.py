"""What distillation is worth after pruning: half of SmolLM2-135M, trained plainly and by the whole.

    python -m benchmarks.distillation PATH/SmolLM2-135M-Instruct.Q4_1.gguf runs/distillation
    python -m benchmarks.distillation FILE.gguf runs/by_four --steps 50 --rows 4

The model is first tuned on the text that all of this is about, Python's reference: a teacher that
has never seen it would teach something else (teacher correction: Minitron in practice, arXiv
2408.11796). Then it is pruned to about half of its parameters, and from there it goes two ways,
over the same rows and with the same optimizer: by the next token alone, and by the distributions
of the unpruned model. Perplexities are of topics that are held out. What was stopped goes on. On
two CPU cores about an hour.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from benchmarks.tables import print_table
from l32jax import api
from l32jax.__main__ import main as command
from l32jax.checkpoint.engine.transfer import SILENT
from l32jax.checkpoint.formats import open_checkpoint
from l32jax.compress.batches import Batches, open_sets
from l32jax.compress.calibration import Calibration, Subject
from l32jax.model.parameters import count
from l32jax.objective_config import Distill, NextToken, Objective, Teacher
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig

TRAIN, TEST = "python-docs/train", "python-docs/test"
SIZES = ("--mlp-dim", "512", "--heads", "6", "--embed-dim", "512")
LENGTH, JUDGED = 512, 32  # tokens in a row; rows


def pruned(source: Path, folder: Path) -> Path:
    """The command's own result, made once."""
    if not folder.exists():
        sets = ("--calibration", TRAIN, "--held-out", TEST, "--rows", "32", "--length", str(LENGTH))
        code = command(["prune", str(source), str(folder), "--to", "custom", *SIZES, *sets])
        if code:
            raise SystemExit(code)
    return folder


def trained(
    start: Path, folder: Path, *, steps: int, rows: int, peak_lr: float, objective: Objective
) -> api.Model:
    """The same rows in the same order, whatever the model and the objective."""
    stage = StageConfig(
        name=objective.kind,
        num_steps=steps,
        trains=("language_model",),
        data=DataConfig(mixture=((TRAIN, 1.0),), batch_size=rows, length=LENGTH),
        optimizer=OptimizerConfig(peak_lr=peak_lr, warmup_steps=steps // 10),
        objective=objective,
    )
    config = TrainConfig(
        model=open_checkpoint(start, verified=False).config,
        stages=(stage,),
        directory=str(folder),
        start_from=str(start),
    )
    return api.run(config)


def held_out(model: api.Model) -> Batches:
    """Rows that every model is judged by: as of a calibration, of the test alone."""
    sets = open_sets(
        model.config,
        model.require_tokenizer(),
        model.mesh,
        calibration=TEST,
        held_out=TEST,
        rows=JUDGED,
        length=LENGTH,
    )
    return sets.calibration


def perplexity(model: api.Model, batches: Batches) -> float:
    with jax.set_mesh(model.mesh):
        loss = Calibration(batches, SILENT, "").loss(Subject(model.config, model.params))
    return math.exp(loss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="after pruning")
    parser.add_argument("--rows", type=int, default=1, help="of 512 tokens, in each of these steps")
    parser.add_argument("--peak-lr", type=float, default=5e-4, help="of these steps")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    whole = api.load(options.source)
    with jax.set_mesh(whole.mesh):
        judged = held_out(whole)
    tuned, small = options.directory / "tuned", options.directory / "pruned"
    teacher = Teacher(model=whole.config, start_from=str(tuned))
    tune = partial(trained, steps=50, rows=4, peak_lr=2e-4, objective=NextToken())
    heal = partial(trained, small, steps=options.steps, rows=options.rows, peak_lr=options.peak_lr)
    distill = Distill(teachers=(teacher,))
    ways: dict[str, Callable[[], api.Model]] = {
        "whole": lambda: whole,
        "whole, tuned": lambda: tune(options.source, tuned),
        "pruned": lambda: api.load(pruned(tuned, small)),
        "pruned, plain": lambda: heal(options.directory / "plain", objective=NextToken()),
        "pruned, distilled": lambda: heal(options.directory / "distilled", objective=distill),
    }
    rows = []
    for name, way in ways.items():
        begun = time.monotonic()
        model = way()
        minutes = (time.monotonic() - begun) / 60
        rows.append(
            {
                "model": name,
                "parameters": f"{count(model.params) / 1e6:.1f} M",
                "perplexity": f"{perplexity(model, judged):.1f}",
                "minutes": f"{minutes:.1f}",
            }
        )
    tokens = options.rows * LENGTH
    print(f"{options.steps} steps of {tokens:,} tokens, {len(jax.devices())} CPU device(s)")
    print_table(rows)


if __name__ == "__main__":
    main()
