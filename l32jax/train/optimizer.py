"""The optimizer of a stage, from its config (optax)."""

import math
from collections.abc import Callable
from functools import partial

import jax
import optax

from l32jax.config import OptimizerConfig
from l32jax.model.parameters import Params, path_name


def learning_rate(config: OptimizerConfig, num_steps: int, step: int) -> float:
    """Of one step: a linear warm-up, whose first step learns already, then the decay.

    The decay reaches `final_lr` where the stage ends, after its last step.
    """
    peak, final, warmup = config.peak_lr, config.final_lr, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(num_steps - warmup, 1)
    left = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "constant": 1.0,
    }[config.schedule]
    return final + (peak - final) * left


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW for a learning rate of 1; weight decay spares norms, biases, gates, position tables.

    The rate multiplies its updates from outside: stages that differ in nothing else then share
    one compiled step.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            1.0,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_ending("/weight"),
        ),
        optax.masked(optax.scale(config.gate_rate), _ending("gate")),
    )


def _ending(suffix: str) -> Callable[[Params], Params]:
    """The mask of the parameters whose names end like this."""
    return partial(jax.tree.map_with_path, lambda path, _: path_name(path).endswith(suffix))
