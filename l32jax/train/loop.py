"""Running a configured run: its stages in order, each resumable at any step."""

import logging
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from l32jax.checkpoint.steps import Steps
from l32jax.checkpoint.store import SaveError, Store
from l32jax.config_text import changed_fields, to_json
from l32jax.data.batches import Batches, place
from l32jax.data.rows import Batch
from l32jax.data.sources.mixture import open_batches
from l32jax.data.tokenizer import Tokenizer
from l32jax.model.parameters import Params
from l32jax.objective_config import Teacher
from l32jax.run_config import StageConfig, TrainConfig
from l32jax.sharding import row_share
from l32jax.train.accumulate import require_even_rows
from l32jax.train.bad_steps import Judge, RollBack
from l32jax.train.board import open_board
from l32jax.train.ending import restart_from
from l32jax.train.features import Stopped, compute_features
from l32jax.train.goodput import Clock
from l32jax.train.optimizer import learning_rate
from l32jax.train.peers import watched
from l32jax.train.report import Report
from l32jax.train.run_folder import at_work
from l32jax.train.step import (
    TrainState,
    abstract_state,
    begin_options,
    begin_stage,
    end_stage,
    init_state,
    stage_step,
    teachers_of,
)
from l32jax.train.stopping import Interrupted, Stop
from l32jax.train.watchdog import watchdog

logger = logging.getLogger(__name__)


Step = Callable[[TrainState, dict[str, Array], Array], tuple[TrainState, dict[str, Any]]]


class Beside(NamedTuple):
    """What goes along with a run from its begin to its end.

    Attributes:
      blamed: around what needs the other processes; see `peers`.
      load: the parameters of a teacher, on the mesh.
      open_rows: what a stage is fed with.
    """

    clock: Clock
    stop: Stop
    blamed: Callable[[], AbstractContextManager[None]]
    load: Callable[[Teacher], Params] | None
    open_rows: "OpenRows"


@runtime_checkable
class Fed(Protocol):
    """What a stage is fed with: `Batches`, or what answers with the policy that is set."""

    policy: Any

    def __next__(self) -> Batch: ...
    def get_state(self) -> bytes: ...
    def set_state(self, states: Sequence[bytes]) -> None: ...
    def close(self) -> None: ...


OpenRows = Callable[[TrainConfig, int, Tokenizer, Mesh], Fed]


def rows_of_stage(config: TrainConfig, number: int, tokenizer: Tokenizer, mesh: Mesh) -> Batches:
    """This process's share of the rows of a stage's sources."""
    stage, (share, shares) = config.stages[number], row_share(mesh)
    return open_batches(
        stage.data,
        config.model,
        tokenizer,
        objective=stage.objective,
        seed=config.seed + number,
        process_index=share,
        process_count=shares,
    )


def train(
    config: TrainConfig,
    tokenizer: Tokenizer,
    params: Params | None,
    mesh: Mesh,
    load: Callable[[Teacher], Params] | None = None,
    open_rows: OpenRows = rows_of_stage,
) -> Params:
    """Runs what is left of the run's stages and returns the final parameters.

    Args:
      params: what the first stage starts from; None for random ones. They are donated.
      load: reads the parameters of a teacher, when its stage begins; for stages that have some.
      open_rows: what a stage, whose model the config has, is fed with.
    """
    for stage in config.stages:
        require_even_rows(stage, mesh.shape)
    board, restart = open_board(), restart_from(partial(newest_save, config))
    stop, writing = Stop(board), jax.process_index() == 0
    with (
        watched(board, restart, Path(config.directory)) as peers,
        at_work(config, writing=writing, stopped_by=Interrupted) as clock,
        watchdog(config, clock, restart, tell=peers and peers.end),
    ):
        beside = Beside(clock, stop, peers.blamed if peers else nullcontext, load, open_rows)
        for number in range(len(config.stages)):
            with jax.set_mesh(mesh):
                state = run_stage(config, number, tokenizer, params, mesh, beside)
                params = state.params
    assert params is not None
    return params


def stage_directory(config: TrainConfig, number: int) -> Path:
    return Path(config.directory) / f"{number + 1}_{config.stages[number].name}"


def newest_save(config: TrainConfig) -> tuple[int, int]:
    """The number of the stage that was saved last, and its step; (-1, 0) if none was."""
    steps = [Steps(stage_directory(config, n)).latest() for n in range(len(config.stages))]
    return max(((n, step) for n, step in enumerate(steps) if step is not None), default=(-1, 0))


class _Stage(NamedTuple):
    """A stage at work; its config's model is what the checkpoints of the stage say they hold."""

    config: TrainConfig
    number: int
    mesh: Mesh
    tokenizer: Tokenizer
    batches: Fed
    store: Store
    load: Callable[[Teacher], Params] | None

    @property
    def stage(self) -> StageConfig:
        return self.config.stages[self.number]


def run_stage(
    config: TrainConfig,
    number: int,
    tokenizer: Tokenizer,
    params: Params | None,
    mesh: Mesh,
    beside: Beside,
) -> TrainState:
    """One stage from its newest checkpoint, or from `params`, to its last step."""
    beside.clock.switch("training_prep")
    config = replace(config, model=config.model_of(number))
    batches = beside.open_rows(config, number, tokenizer, mesh)
    with closing(batches), Store(stage_directory(config, number), keep=config.keep) as store:
        at = _Stage(config, number, mesh, tokenizer, batches, store, beside.load)
        if store.steps():
            beside.clock.switch("unproductive_checkpoint_restore_time")
        state = _init_or_restore(at, params)
        beside.clock.switch("training_prep")
        if int(state.step) == at.stage.num_steps:
            return state
        if at.stage.data.features is not None:
            _compute_features(at, state, beside.stop)
        return _finish(at, state, beside)


def _finish(at: _Stage, state: TrainState, beside: Beside) -> TrainState:
    """What is left of a stage's steps; after a rollback, again what is left of them."""
    step = stage_step(at.config, at.number)
    if teachers := teachers_of(at.stage):
        assert at.load is not None
        step = partial(step, taught_by=tuple(map(at.load, teachers)))
    judge = Judge(Path(at.config.directory), at.number, at.stage)
    if at.stage.bad_steps.then == "rollback" and not at.store.steps():
        _save(at, 0, state)
        at.store.wait()  # there is no other way back before the first step that is saved
    while True:
        report = Report(
            at.config,
            at.number,
            int(state.step),
            clock=beside.clock,
            mesh=at.mesh,
            tokenizer=at.tokenizer,
            judge=judge,
        )
        try:
            with report, beside.stop.listening(), beside.blamed():
                return _take_steps(at, step, state, report, judge, beside.stop)
        except RollBack as bad:
            traceback.clear_frames(bad.__traceback__)  # they hold the state that is given up
            beside.clock.switch("unproductive_checkpoint_restore_time")
            state = _init_or_restore(at, None)
            judge.go_back(bad, int(state.step))


def _take_steps(
    at: _Stage, step: Step, state: TrainState, report: Report, judge: Judge, stop: Stop
) -> TrainState:
    last = at.stage.num_steps
    for index in range(int(state.step), last):
        for _ in range(judge.left_out(index)):
            next(at.batches)
        at.batches.policy = state.params
        with report.waiting():
            batch = next(at.batches)
        rate = learning_rate(at.stage.optimizer, last, index)
        placed = place(batch, at.mesh)
        state, metrics = step(state, placed, jnp.float32(rate))
        # The devices are at work on it; this reads the metrics of the step before.
        metrics |= {"learning_rate": rate}
        report(index, batch, metrics, placed=placed, params=state.params)
        done = index + 1
        if done == last:
            state = end_stage(at.config.model, at.stage, state)
        stopping = stop.after_step()  # asked once: a signal may come between two answers
        if stopping or done == last or done % at.config.save_every == 0:
            with report.saving():
                _save(at, done, state)
        if stopping:
            at.store.wait()
            raise Interrupted(at.stage.name, done)
    return state


def _init_or_restore(at: _Stage, params: Params | None) -> TrainState:
    config, stage, seed = at.config, at.stage, at.config.seed + at.number
    if at.store.steps():
        return _restored(at, abstract_state(config, at.number, at.mesh))
    options = begin_options(config)
    if params is None:
        return jax.jit(partial(init_state, config.model, stage, seed, **options))()
    begin = partial(begin_stage, config.model, stage, seed=seed, **options)
    with warnings.catch_warnings():  # what gets another size or dtype cannot stay where it is
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        state = jax.jit(begin, donate_argnums=0)(params)
    jax.tree.map(lambda leaf: leaf.delete(), params)  # of those, which the stage would carry along
    return state


def _restored(at: _Stage, target: TrainState) -> TrainState:
    """Of the newest checkpoint; older versions saved none of what steps are judged by."""
    restored = at.store.restore(target, may_lack="guard/")
    if changed := changed_fields(restored.config_json, at.config):
        logger.warning(
            "stage %r goes on from step %d with another config: %s",
            at.stage.name,
            restored.step,
            ", ".join(changed),
        )
    at.batches.set_state(restored.iterator_states)
    lacks_guard = any(each is None for each in restored.state.guard)
    return restored.state._replace(guard=None) if lacks_guard else restored.state


def _compute_features(at: _Stage, state: TrainState, stop: Stop) -> None:
    stops = stop.outside_steps
    try:
        with stop.listening():
            compute_features(at.config, at.stage, at.tokenizer, state.params, at.mesh, stops=stops)
    except Stopped:
        raise Interrupted(at.stage.name, int(state.step)) from None


def _save(at: _Stage, step: int, state: TrainState) -> None:
    """Training outlives a full disk: the step is lost, and the next one is tried."""
    try:
        at.store.save(
            step,
            state,
            config_json=to_json(at.config),
            iterator_state=at.batches.get_state(),
            extra_files=at.tokenizer.files(),
        )
    except SaveError as error:
        logger.warning("%s", error)
