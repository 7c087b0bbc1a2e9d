"""The verb that measures reward models."""

from typing import Annotated

from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from l32jax.cli.ask import Source


def judge(source: Annotated[str, arg(metavar="PAIRS")], /, model: Source) -> int:
    """Asks a reward model which answers are better, and how sure it is.

    Of each comparison in PAIRS it reads the rewards of both answers. Accuracy is the share in which
    the better one has more; calibration how far off, on average, sigmoid(difference) is as the
    probability of that.

    Examples:
      l32jax judge held_out_pairs.jsonl --model runs/reward
      l32jax judge 'preferences/test-*.parquet' --model runs/vision_reward --dtype bfloat16

    Args:
      source: comparisons, as a run's mixture names them.
    """
    from l32jax.evaluate.reward import preferences

    found = preferences(model.load(), source)
    table = Table("", "number")
    table.columns[1].justify = "right"
    table.add_row("comparisons", f"{found.pairs:,}")
    if found.bad:
        table.add_row("unreadable", f"{found.bad:,}")
    table.add_row("accuracy", f"{found.accuracy:.1%}")
    table.add_row("calibration error", f"{found.calibration:.1%}")
    table.add_row("loss", f"{found.loss:.3f} nats")
    Console().print(table)
    return 0
