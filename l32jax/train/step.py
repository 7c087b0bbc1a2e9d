"""The training step, and nothing that it does not need."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from l32jax.config import LlamaConfig, StageConfig
from l32jax.model.llama import Llama, bind, init_params
from l32jax.model.parameters import Params, combine, partition, trains
from l32jax.train.objectives import Batch, Metrics
from l32jax.train.optimizer import make_optimizer

Objective = Callable[[Llama, Batch, Array], tuple[Array, Metrics]]


class TrainState(NamedTuple):
    """Everything of a run that a step changes, or that later steps depend on.

    `opt_state` has leaves for the parameters that train, and none for frozen ones.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    rng: UInt32[Array, "2"]  # raw key data: a checkpoint holds plain arrays


def init_state(config: LlamaConfig, stage: StageConfig, seed: int) -> TrainState:
    """Random parameters and an empty optimizer. Run it in one jit: arrays are born sharded."""
    key = jax.random.key(seed)
    return begin_stage(config, stage, init_params(config, key), seed=seed)


def begin_stage(
    config: LlamaConfig, stage: StageConfig, params: Params, *, seed: int
) -> TrainState:
    """Step 0 of a stage that goes on from `params`: a fresh optimizer for what it trains."""
    trainable, _ = partition(params, trains(stage.trains, config))
    optimizer = make_optimizer(stage.optimizer)
    rng = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
    return TrainState(jnp.int32(0), params, optimizer.init(trainable), rng)


def make_train_step(
    config: LlamaConfig, stage: StageConfig, objective: Objective
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
    """The jitted (state, batch, learning rate) -> (state, metrics) of a stage.

    Frozen parameters get no gradient and have no optimizer state.
    """
    is_trainable = trains(stage.trains, config)
    optimizer = make_optimizer(stage.optimizer)

    @partial(jax.jit, donate_argnames="state")
    def train_step(state: TrainState, batch: Batch, rate: Float[Array, ""]):
        trainable, frozen = partition(state.params, is_trainable)

        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def batch_loss(trainable):
            return objective(bind(config, combine(trainable, frozen)), batch, rng)

        grads, metrics = jax.grad(batch_loss, has_aux=True)(trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        updates = optax.tree.scale(rate, updates)
        params = combine(optax.apply_updates(trainable, updates), frozen)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    return train_step
