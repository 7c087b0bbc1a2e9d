"""Running a configured run: its stages in order, each resumable at any step."""

import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from l32jax.checkpoint.store import SaveError, Store
from l32jax.config_text import changed_fields, to_json
from l32jax.data.batches import Batches, place
from l32jax.data.sources.mixture import open_batches
from l32jax.data.tokenizer import Tokenizer
from l32jax.model.parameters import Params, on_mesh
from l32jax.run_config import StageConfig, TrainConfig
from l32jax.train.accumulate import require_even_rows
from l32jax.train.features import compute_features
from l32jax.train.goodput import Clock
from l32jax.train.objectives import next_token
from l32jax.train.optimizer import learning_rate
from l32jax.train.report import Report
from l32jax.train.run_folder import at_work
from l32jax.train.step import TrainState, begin_stage, end_stage, init_state, make_train_step

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop and has saved; the same command goes on with it."""

    def __init__(self, stage: str, step: int):
        super().__init__(
            f"saved stage {stage!r} at step {step}; the same command goes on from there"
        )


def train(config: TrainConfig, tokenizer: Tokenizer, params: Params | None, mesh: Mesh) -> Params:
    """Runs what is left of the run's stages and returns the final parameters.

    Args:
      params: what the first stage starts from; None for random ones. They are donated.
    """
    for stage in config.stages:
        require_even_rows(stage, mesh)
    writing = jax.process_index() == 0
    with at_work(config, writing=writing, stopped_by=Interrupted) as clock:
        for number, stage in enumerate(config.stages):
            with jax.set_mesh(mesh):
                state = run_stage(config, number, stage, tokenizer, params, mesh, clock)
                params = state.params
    assert params is not None
    return params


def stage_directory(config: TrainConfig, number: int) -> Path:
    return Path(config.directory) / f"{number + 1}_{config.stages[number].name}"


def run_stage(
    config: TrainConfig,
    number: int,
    stage: StageConfig,
    tokenizer: Tokenizer,
    params: Params | None,
    mesh: Mesh,
    clock: Clock,
) -> TrainState:
    """One stage from its newest checkpoint, or from `params`, to its last step."""
    clock.switch("training_prep")
    config = replace(config, model=config.model_of(number))  # which its checkpoints say they hold
    batches = open_batches(
        stage.data,
        config.model,
        tokenizer,
        seed=config.seed + number,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with closing(batches), Store(stage_directory(config, number), keep=config.keep) as store:
        if store.steps():
            clock.switch("unproductive_checkpoint_restore_time")
        state = _init_or_restore(config, number, stage, store, batches, params, mesh)
        clock.switch("training_prep")
        first, last = int(state.step), stage.num_steps
        if first == last:
            return state
        if stage.data.features is not None:
            _compute_features(config, stage, tokenizer, state, mesh)
        tokenizer_files = tokenizer.files()
        objective = partial(
            next_token,
            z_loss=stage.z_loss,
            dtype=jnp.dtype(config.dtype),
            saved=config.saved,
            attention=config.attention,
        )
        matrix_dtype = config.dtype if config.params == "bfloat16" else "float32"
        step = make_train_step(config.model, stage, objective, matrix_dtype=jnp.dtype(matrix_dtype))
        report = Report(config, number, first, clock=clock, mesh=mesh, tokenizer=tokenizer)
        with report, _stop_requested() as stop:
            for index in range(first, last):
                with report.waiting():
                    batch = next(batches)
                rate = learning_rate(stage.optimizer, last, index)
                placed = place(batch, mesh)
                state, metrics = step(state, placed, jnp.float32(rate))
                # The devices are at work on it; this reads the metrics of the step before.
                metrics |= {"learning_rate": rate}
                report(index, batch, metrics, placed=placed, params=state.params)
                done = index + 1
                if done == last:
                    state = end_stage(config.model, stage, state)
                stopping = stop()  # asked once a step: a signal may come between two answers
                if stopping or done == last or done % config.save_every == 0:
                    with report.saving():
                        _save(store, done, state, batches, config, tokenizer_files)
                if stopping:
                    store.wait()
                    raise Interrupted(stage.name, done)
    return state


def _init_or_restore(
    config: TrainConfig,
    number: int,
    stage: StageConfig,
    store: Store,
    batches: Batches,
    params: Params | None,
    mesh: Mesh,
) -> TrainState:
    seed = config.seed + number
    dtype = jnp.dtype(config.params)
    init = partial(init_state, config.model, stage, seed, frozen_dtype=dtype)
    if store.steps():
        restored = store.restore(on_mesh(jax.eval_shape(init), mesh))
        if changed := changed_fields(restored.config_json, config):
            logger.warning(
                "stage %r goes on from step %d with another config: %s",
                stage.name,
                restored.step,
                ", ".join(changed),
            )
        batches.set_state(restored.iterator_states)
        return restored.state
    if params is None:
        return jax.jit(init)()
    begin = partial(begin_stage, config.model, stage, seed=seed, frozen_dtype=dtype)
    with warnings.catch_warnings():  # what gets another size or dtype cannot stay where it is
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        state = jax.jit(begin, donate_argnums=0)(params)
    jax.tree.map(lambda leaf: leaf.delete(), params)  # of those, which the stage would carry along
    return state


def _compute_features(
    config: TrainConfig, stage: StageConfig, tokenizer: Tokenizer, state: TrainState, mesh: Mesh
) -> None:
    with _stop_requested() as stop:

        def check_stop() -> None:
            if stop():
                raise Interrupted(stage.name, int(state.step))

        compute_features(config, stage, tokenizer, state.params, mesh, check_stop=check_stop)


def _save(
    store: Store,
    step: int,
    state: TrainState,
    batches: Batches,
    config: TrainConfig,
    tokenizer_files: Mapping[str, bytes],
) -> None:
    """Training outlives a full disk: the step is lost, and the next one is tried."""
    try:
        store.save(
            step,
            state,
            config_json=to_json(config),
            iterator_state=batches.get_state(),
            extra_files=tokenizer_files,
        )
    except SaveError as error:
        logger.warning("%s", error)


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """True once Ctrl-C or SIGTERM has come; a second Ctrl-C ends the process at once."""
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
