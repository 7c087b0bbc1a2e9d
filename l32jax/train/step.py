"""The training step, and nothing that it does not need."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from l32jax.config import LlamaConfig, Stored
from l32jax.model.llama import bind, init_params
from l32jax.model.matrices import is_projection
from l32jax.model.parameters import Params, combine, on_mesh, partition, path_name, trains
from l32jax.model.quantise import frozen_as, trainable
from l32jax.model.resize import resize_positions
from l32jax.objective_config import Distill, Dpo, Grpo, Reward, Teacher
from l32jax.run_config import StageConfig, TrainConfig
from l32jax.train.accumulate import summed_gradients
from l32jax.train.average import averaged, begin_average
from l32jax.train.bad_steps import Guard, begin_guard, judged, kept_if
from l32jax.train.distillation import distill
from l32jax.train.inside import part_norms
from l32jax.train.objectives import Batch, Metrics, next_token
from l32jax.train.offload import DEVICE, HOST, abstract_in_host_memory, in_memory
from l32jax.train.optimizer import make_optimizer
from l32jax.train.policy import grpo
from l32jax.train.preferences import dpo, reward
from l32jax.train.reference import begin_reference, moved

# (model, batch, rng) -> (sum to minimise, sums). What it is held against comes by name: the
# `reference` and the `teachers`, models too.
Minimised = Callable[..., tuple[Array, Metrics]]


class TrainState(NamedTuple):
    """Everything of a run that a step changes, or that later steps depend on.

    `opt_state`, `average` and `reference` have leaves for the parameters that train, and none for
    frozen ones; the latter two have none where the stage takes none. `guard` is what steps are
    judged by, `reference` the model that the objective holds against the one that trains.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    rng: UInt32[Array, "2"]  # raw key data: a checkpoint holds plain arrays
    average: Params | None = None
    guard: Guard | None = None
    reference: Params | None = None


def init_state(config: LlamaConfig, stage: StageConfig, seed: int, **options: Any) -> TrainState:
    """Random parameters and an empty optimizer. Run it in one jit: arrays are born sharded.

    Args:
      options: those of `begin_stage`.
    """
    params = init_params(config, jax.random.key(seed))
    return begin_stage(config, stage, params, seed=seed, **options)


def begin_stage(
    config: LlamaConfig,
    stage: StageConfig,
    params: Params,
    *,
    seed: int,
    frozen: Stored = "float32",
    offload: bool = False,
) -> TrainState:
    """Step 0 of a stage that goes on from `params`: a fresh optimizer for what it trains.

    Args:
      config: the stage's model; the parameters may be of another image size, and of any dtype.
      frozen: how parameters are kept that do not train; those that do are float32.
      offload: the optimizer's state is in the host's memory, and each step takes it there again.
    """
    if config.vision is not None:
        params = resize_positions(params, config.vision)
    learning, others = partition(params, trains(stage.trains, config))
    learning, others = trainable(learning), frozen_as(frozen, others)
    rng = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
    opt_state = make_optimizer(stage.optimizer).init(learning)
    return TrainState(
        jnp.int32(0),
        combine(learning, others),
        in_memory(HOST, opt_state) if offload else opt_state,
        rng,
        begin_average(stage, learning),
        begin_guard(),
        begin_reference(stage.objective, learning, frozen),
    )


def begin_options(config: TrainConfig) -> dict[str, Any]:
    """What `begin_stage` is told of a run."""
    return {"frozen": config.params, "offload": config.offload == "optimizer"}


def abstract_state(config: TrainConfig, number: int, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and places of a stage's state; nothing is allocated."""
    model, stage = config.model_of(number), config.stages[number]
    init = partial(init_state, model, stage, config.seed + number, **begin_options(config))
    state = on_mesh(jax.eval_shape(init), mesh)
    if config.offload == "none":
        return state
    return state._replace(opt_state=abstract_in_host_memory(state.opt_state))


def end_stage(config: LlamaConfig, stage: StageConfig, state: TrainState) -> TrainState:
    """The state whose parameters are what the stage results in: its average, if it takes one."""
    if state.average is None:
        return state
    _, frozen = partition(state.params, trains(stage.trains, config))
    return state._replace(params=combine(state.average, frozen))


Step = Callable[..., tuple[TrainState, Metrics]]


def stage_step(config: TrainConfig, number: int) -> Step:
    """The step of a run's stage."""
    stage = config.stages[number]
    matrix_dtype = jnp.dtype("float32" if config.params == "float32" else config.dtype)
    return make_train_step(
        config.model_of(number),
        stage,
        _minimised(config, stage),
        matrix_dtype=matrix_dtype,
        offload=config.offload == "optimizer",
        teachers=teachers_of(stage),
    )


def teachers_of(stage: StageConfig) -> tuple[Teacher, ...]:
    """The models that a stage's steps are given, as parameters, beside its state."""
    return stage.objective.teachers if isinstance(stage.objective, Distill) else ()


def _minimised(config: TrainConfig, stage: StageConfig) -> Minimised:
    options = {
        "dtype": jnp.dtype(config.dtype),
        "saved": config.saved,
        "attention": config.attention,
    }
    match stage.objective:
        case Distill() as how:
            return partial(distill, how=how, **options)
        case Dpo() as how:
            return partial(dpo, how=how, **options)
        case Reward() as how:
            return partial(reward, how=how, **options)
        case Grpo() as how:
            return partial(grpo, how=how, **options)
    return partial(next_token, z_loss=stage.z_loss, **options)


def make_train_step(
    config: LlamaConfig,
    stage: StageConfig,
    objective: Minimised,
    *,
    matrix_dtype: Any = jnp.float32,
    offload: bool = False,
    teachers: Sequence[Teacher] = (),
) -> Step:
    """The jitted (state, batch, learning rate, parameters of teachers) -> (state, metrics).

    Frozen parameters get no gradient and have no optimizer state. Metrics are means over the
    batch's targets, their "weight", and the norm of the gradients.

    Args:
      objective: of the stage; it is given its reference and teachers by these names.
      matrix_dtype: in which the model sees the matrices that train.
      offload: as `begin_stage` was told.
    """
    is_trainable = trains(stage.trains, config)
    optimizer = make_optimizer(stage.optimizer)

    @partial(jax.jit, donate_argnames="state")
    def train_step(
        state: TrainState, batch: Batch, rate: Float[Array, ""], taught_by: Sequence[Params] = ()
    ):
        trainable, frozen = partition(state.params, is_trainable)
        beside: dict[str, Any] = {}
        if state.reference is not None:
            beside["reference"] = bind(config, combine(state.reference, frozen))
        if teachers:
            pairs = zip(teachers, taught_by, strict=True)
            beside["teachers"] = [bind(teacher.model, params) for teacher, params in pairs]

        def loss_sum(trainable, rows, rng):
            return objective(bind(config, combine(trainable, frozen)), rows, rng, **beside)

        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        seen = _with_matrices_of(matrix_dtype, trainable)
        grads, sums = summed_gradients(loss_sum, seen, batch, rng, stage.accumulate)
        weight = sums.pop("weight")
        grads, metrics = optax.tree.scale(1 / jnp.maximum(weight, 1e-6), (grads, sums))

        opt_before = in_memory(DEVICE, state.opt_state)
        updates, opt_state = optimizer.update(grads, opt_before, trainable)
        updated = optax.apply_updates(trainable, optax.tree.scale(rate, updates))
        done = state.step + 1
        learned = (
            updated,
            opt_state,
            averaged(stage, state.average, updated, done),
            moved(stage.objective, state.reference, updated, done),
        )
        metrics |= {"weight": weight, "grad_norm": optax.tree.norm(grads)}
        metrics |= part_norms(grads, config)
        guard = state.guard or begin_guard()
        guard, bad = judged(stage.bad_steps, guard, metrics["loss"], metrics["grad_norm"])
        metrics |= {"bad": guard.in_a_row}
        if stage.bad_steps.then == "skip":
            before = trainable, opt_before, state.average, state.reference
            learned = kept_if(bad, before, learned)
            metrics |= {"skipped": guard.skipped}
        updated, opt_state, average, reference = learned
        if offload:
            opt_state = in_memory(HOST, opt_state)
        params = combine(updated, frozen)
        return TrainState(done, params, opt_state, state.rng, average, guard, reference), metrics

    return train_step


def _with_matrices_of(dtype: Any, params: Params) -> Params:
    """Tables stay as they are: their gradients are sums over many places, in their own dtype."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.astype(dtype) if is_projection(path_name(path)) else leaf, params
    )
