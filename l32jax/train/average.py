"""An average of a stage's parameters over its steps, which is what the stage results in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l32jax.model.parameters import Params
from l32jax.run_config import StageConfig


def begin_average(stage: StageConfig, trainable: Params) -> Params | None:
    """Zeros, which the first sample replaces."""
    if stage.average == "none":
        return None
    return jax.tree.map(jnp.zeros_like, trainable)


def averaged(
    stage: StageConfig, average: Params | None, trainable: Params, done: Int[Array, ""]
) -> Params | None:
    """The average after `done` steps; it changes if a sample is due."""
    if average is None:
        return None
    first = _first_sample(stage)
    number = (done - first) // stage.average_every + 1
    is_due = (done >= first) & ((done - first) % stage.average_every == 0)

    def sample() -> Params:
        weight = _weight(stage, number)
        return jax.tree.map(lambda a, p: a * (1 - weight) + p * weight, average, trainable)

    return jax.lax.cond(is_due, sample, lambda: average)


def _first_sample(stage: StageConfig) -> int:
    """Steps done before the first sample; counted so that the last one comes at the stage's end."""
    since = stage.num_steps - max(round(stage.average_from * stage.num_steps), 1)
    return stage.num_steps - since // stage.average_every * stage.average_every


def _weight(stage: StageConfig, number: Int[Array, ""]) -> Float[Array, ""]:
    """Of the sample with this number, which begins at 1."""
    if stage.average == "polyak":
        return 1 / number.astype(jnp.float32)
    return jnp.where(number == 1, 1.0, 1 - stage.ema_decay)
