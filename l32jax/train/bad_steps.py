"""Steps that would spoil a run: whose loss or gradient is not finite, or far above what is usual.

A step judges itself, on the devices, so that it can leave its update out. The loop reads the
judgement when the next step is under way, in all processes at the same place, and before anything
is saved. What a rollback leaves out of the data is written down in the run's folder before the run
goes on; who starts it again leaves out the same.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from l32jax.errors import InputError
from l32jax.run_config import BadSteps, StageConfig
from l32jax.train import journal
from l32jax.train.stopping import Agreed

FILE = "rollbacks.jsonl"
REMEMBERED, ENOUGH = 64, 16  # good steps whose median is what is usual; how many make one

logger = logging.getLogger(__name__)


class Guard(NamedTuple):
    """What steps are judged by; part of a run's state.

    Attributes:
      losses, norms: of the last good steps; NaN where there was none yet.
      good: how many good steps there were.
      in_a_row: how many bad ones there were since the last of them.
      skipped: updates that were left out.
    """

    losses: Float[Array, "steps"]
    norms: Float[Array, "steps"]
    good: Int[Array, ""]
    in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]


def begin_guard() -> Guard:
    none, zero = jnp.full(REMEMBERED, jnp.nan), jnp.int32(0)
    return Guard(none, none, zero, zero, zero)


def judged(
    config: BadSteps, guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Guard, Bool[Array, ""]]:
    """The guard after a step, and whether that is bad."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    if config.spike:
        usual = jnp.nanmedian(guard.losses), jnp.nanmedian(guard.norms)
        spike = (loss > config.spike * usual[0]) | (norm > config.spike * usual[1])
        bad |= spike & (guard.good >= ENOUGH)
    place = guard.good % REMEMBERED
    after = Guard(
        guard.losses.at[place].set(loss),
        guard.norms.at[place].set(norm),
        guard.good + 1,
        jnp.int32(0),
        guard.skipped,
    )
    skipped = guard.skipped + (config.then == "skip")
    before = guard._replace(in_a_row=guard.in_a_row + 1, skipped=skipped)
    return kept_if(bad, before, after), bad


def kept_if(bad: Bool[Array, ""], before: Any, after: Any) -> Any:
    """Of two trees of arrays the first, to the last bit, if the step is bad."""
    return jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, after)


class RollBack(Agreed):
    """A step was bad, and the run is to go on from its last checkpoint, with other data."""

    def __init__(self, step: int, why: str):
        super().__init__(why)
        self.step = step


class Judge:
    """Does with the bad steps of a stage what its config says.

    Args:
      directory: of the run.
      number: of the stage.
    """

    def __init__(self, directory: Path, number: int, stage: StageConfig):
        self._directory, self._number, self._stage = directory, number, stage
        self._records = [
            record
            for record in journal.read(directory / FILE).records
            if record.get("stage") == number and _is_record(record)
        ]

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Of a step that has ended, the number that are done with it, and what it returned.

        Raises:
          InputError: it was bad, and that is the end.
          RollBack: it was bad, and the caller is to go back.
        """
        in_a_row = int(_read(metrics.get("bad", 0)))
        if not in_a_row:
            return
        loss, norm = (float(_read(metrics[name])) for name in ("loss", "grad_norm"))
        what = f"step {step} of stage {self._stage.name!r}: loss {loss:.4g}, gradient {norm:.4g}"
        config = self._stage.bad_steps
        if config.then == "stop":
            self._give_up(f"{what}, which is bad", "let bad_steps.then be 'skip' or 'rollback'")
        if config.then == "rollback":
            if len(self._records) == config.limit:
                self._give_up(f"{what}, after {config.limit} rollbacks", "raise bad_steps.limit")
            raise RollBack(step, what)
        if in_a_row > config.limit:
            self._give_up(f"{what}, {in_a_row} bad ones in a row", "raise bad_steps.limit")
        if jax.process_index() == 0:
            logger.warning("%s; its update is left out", what)

    def counts(self) -> dict[str, float]:
        """For the metrics."""
        return {"optim/rollbacks": float(len(self._records))} if self._records else {}

    def left_out(self, step: int) -> int:
        """How many batches to pass over before the step that follows so many."""
        return sum(record["left_out"] for record in self._records if record["from"] == step)

    def go_back(self, bad: RollBack, step: int) -> None:
        """From a bad step to one that was saved: writes down what is left out."""
        left_out = bad.step - step + self._stage.bad_steps.beyond
        told = {"stage": self._number, "from": step, "bad": bad.step, "left_out": left_out}
        self._records.append(told)
        if jax.process_index():
            return
        logger.warning("%s; going on from step %d, past %d batches", bad, step, left_out)
        with journal.open_to_append(self._directory / FILE) as file:
            journal.append(file, told)
            os.fsync(file.fileno())

    def _give_up(self, what: str, advice: str) -> None:
        raise InputError(
            f"{what}; nothing is saved since: mend the data or lower peak_lr, or {advice}"
        )


def _read(number: Any) -> np.ndarray:
    return np.asarray(jax.device_get(number))


def _is_record(record: Mapping[str, Any]) -> bool:
    return all(type(record.get(name)) is int for name in ("from", "bad", "left_out"))
