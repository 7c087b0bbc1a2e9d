"""The verb that chains rounds of post-training."""

import sys
from contextlib import closing
from typing import Any

from rich.console import Console
from rich.table import Table

from l32jax.cli import INTERRUPTED
from l32jax.cli.counting import Bar
from l32jax.cli.runs import File, Overrides, execute
from l32jax.cli.stopping import stoppable
from l32jax.config_text import override
from l32jax.errors import InputError

TITLES = {
    "accuracy": "held-out, greedy",
    "sampled_right": "sampled right",
    "any_right": "a right one",
    "reward_accuracy": "reward model",
    "reward_calibration": "its calibration",
}


def rounds(config: File, overrides: Overrides = (), /) -> int:
    """Samples, scores and learns from the best, round after round.

    The file is Python, and has a function `config()` that returns a RoundsConfig. Each round draws
    answers from the model of the round before, verifies them, makes a reward model of the pairs, if
    the config has one, and learns from the best answers, and then from comparisons. What is done is
    kept: the same command goes on after it was stopped (exit code 75) or killed.

    Examples:
      l32jax rounds configs/arithmetic_rounds.py
      l32jax rounds configs/arithmetic_rounds.py rounds=5 run.directory=runs/more

    Args:
      config: the file.
      overrides: fields to change, such as answers=16 or run.stages.0.num_steps=200.
    """
    from l32jax.rounds_config import RoundsConfig

    chosen = execute(config)
    if not isinstance(chosen, RoundsConfig):
        raise InputError(f"config() in {config}: gives {type(chosen).__name__}, not a RoundsConfig")
    for assignment in overrides:
        chosen = override(chosen, assignment)
    from l32jax.rounds.run import run_rounds
    from l32jax.train.stopping import Interrupted

    rows: list[dict[str, Any]] = []
    try:
        with stoppable(), closing(Bar()) as bar:
            for row in run_rounds(chosen, bar):
                rows.append(row)
    except (KeyboardInterrupt, Interrupted):
        print(
            "l32jax: stopped; what is done is kept, and the same command goes on", file=sys.stderr
        )
        return INTERRUPTED
    finally:
        if rows:
            _show(rows, chosen.verifier)
    print(
        f"The model of the last round is in {chosen.run.directory}/round_{rows[-1]['round']}/run."
    )
    return 0


def _show(rows: list[dict[str, Any]], verifier: str) -> None:
    shown = [name for name in TITLES if any(name in row for row in rows)]
    table = Table("round", *(TITLES[name] for name in shown), title=f"verifier {verifier}")
    for row in rows:
        cells = [f"{row[name]:.1%}" if name in row else "" for name in shown]
        table.add_row(str(row["round"]) if row["round"] else "start", *cells)
    Console().print(table)
