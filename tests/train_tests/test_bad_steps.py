"""Steps that are bad: found on the devices, left out to the last bit, gone back from, counted."""

import dataclasses
import json
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.data.batches import Batches
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.model.parameters import on_mesh
from l32jax.run_config import BadSteps
from l32jax.sharding import single_device_mesh
from l32jax.train import loop
from l32jax.train.bad_steps import ENOUGH, FILE, Judge, RollBack, begin_guard, judged
from l32jax.train.objectives import next_token
from l32jax.train.report import Report
from l32jax.train.step import TrainState, init_state, make_train_step
from tests.train_tests.processes import text_in
from tests.train_tests.small import TEXT, rows, stage

judge_step = jax.jit(judged, static_argnums=0)


@given(
    st.lists(st.tuples(st.floats(0.5, 2), st.sampled_from([1, 1, 1, 50, np.nan, np.inf]))),
    st.booleans(),
)
def test_a_step_is_bad_if_it_is_not_finite_or_far_above_the_median_of_good_ones(steps, of_loss):
    config, guard, good = BadSteps(then="skip", spike=10.0), begin_guard(), []
    skipped = in_a_row = 0
    for usual, factor in steps:
        value = np.float32(usual * factor)
        pair = (value, np.float32(usual)) if of_loss else (np.float32(usual), value)
        guard, bad = judge_step(config, guard, *map(jnp.asarray, pair))
        enough = len(good) >= ENOUGH
        spike = enough and value > 10 * np.median(np.array(good[-64:], np.float32))
        assert bool(bad) == (not np.isfinite(value) or bool(spike))
        if bad:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        else:
            good.append(value)
            in_a_row = 0
        assert (int(guard.skipped), int(guard.in_a_row)) == (skipped, in_a_row)


@pytest.fixture(scope="module")
def poisoned():
    """A step whose objective is not a number where the first token says so, and its state."""

    def objective(model, batch, rng):
        loss, sums = next_token(model, batch, rng)
        bad = jnp.where(jnp.any(batch["tokens"][:, 0] == 255), jnp.nan, 1.0)
        return loss * bad, sums | {"loss": sums["loss"] * bad}

    chosen = dataclasses.replace(
        stage(("language_model",)),
        average="ema",
        average_from=0.0,
        bad_steps=BadSteps(then="skip"),
    )
    with jax.set_mesh(single_device_mesh()):
        step = make_train_step(TEXT, chosen, objective)
        yield step, jax.jit(lambda: init_state(TEXT, chosen, 0))


def test_a_skipped_step_changes_nothing_that_was_learned(poisoned):
    step, begin = poisoned
    good = {name: jnp.asarray(array) for name, array in rows(4, images=False).items()}
    bad = good | {"tokens": good["tokens"].at[0, 0].set(255)}
    state, metrics = step(begin(), good, jnp.float32(1e-2))
    assert not metrics["bad"]
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, bad, jnp.float32(1e-2))
    assert metrics["bad"] and metrics["skipped"] == 1 and np.isnan(metrics["grad_norm"])
    assert state.step == 2
    for name in ("params", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(state, name))
    state, metrics = step(state, good, jnp.float32(1e-2))
    assert not metrics["bad"] and metrics["skipped"] == 1
    leaves = zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True)
    assert any((old != new).any() for old, new in leaves)


def metrics_of(step: int, bad: int) -> dict[str, np.ndarray]:
    return {"bad": np.int32(bad), "loss": np.float32(step), "grad_norm": np.float32(np.nan)}


def judge_of(folder, **bad_steps) -> Judge:
    return Judge(folder, 0, dataclasses.replace(stage(()), bad_steps=BadSteps(**bad_steps)))


def test_a_bad_step_stops_the_run_unless_it_may_go_on(tmp_path):
    with pytest.raises(InputError, match=r"step 7 of stage 'small': loss 7, gradient nan"):
        judge_of(tmp_path)(7, metrics_of(7, 1))
    judge = judge_of(tmp_path, then="skip", limit=2)
    for in_a_row in (0, 1, 2):
        judge(7, metrics_of(7, in_a_row))
    with pytest.raises(InputError, match="3 bad ones in a row"):
        judge(9, metrics_of(9, 3))


def test_what_rollbacks_leave_out_is_known_after_a_restart_and_bounded(tmp_path):
    judge = judge_of(tmp_path, then="rollback", limit=2, beyond=3)
    for bad in (7, 9):
        with pytest.raises(RollBack) as caught:
            judge(bad, metrics_of(bad, 1))
        judge.go_back(caught.value, 5)
    again = judge_of(tmp_path, then="rollback", limit=2, beyond=3)
    assert again.left_out(5) == judge.left_out(5) == (2 + 3) + (4 + 3)
    assert again.left_out(4) == again.left_out(6) == 0
    assert again.counts() == {"optim/rollbacks": 2.0}
    with pytest.raises(InputError, match="after 2 rollbacks"):
        again(8, metrics_of(8, 1))


class Numbers(Batches):
    """Batches that are numbers, in order."""

    def __init__(self):
        self.place = 0

    def __next__(self) -> int:
        self.place += 1
        return self.place - 1

    def get_state(self) -> bytes:
        return json.dumps(self.place).encode()

    def set_state(self, states) -> None:
        self.place = json.loads(states[0])

    def close(self) -> None:
        pass


class Judging(Report):
    """Of what a report does, that it has steps judged where all processes are equally far."""

    def __init__(self, *_, judge, **__):
        self._judge, self._unjudged = judge, None

    def __call__(self, index, batch, metrics, **_) -> None:
        self._judge_ended()
        self._unjudged = SimpleNamespace(number=index + 1, metrics=metrics)

    @contextmanager
    def saving(self):
        self._judge_ended()
        yield

    def waiting(self):
        return nullcontext()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


class Walk:
    """A run through the real loop, whose state is a sum of the batches that it was given."""

    def __init__(self, folder: Path, source: str, bad: set[int], monkeypatch):
        config = text_in(folder, source, save_every=4, hung_after=0.0)
        policy = BadSteps(then="rollback")
        chosen = dataclasses.replace(config.stages[0], num_steps=14, bad_steps=policy)
        self.config = dataclasses.replace(config, stages=(chosen,))
        self._bad, self._left = bad, 1000
        one = single_device_mesh()
        for name, stand_in in (
            ("init_state", lambda *_, **__: state_of(0, 0.0)),
            ("abstract_state", lambda *_: on_mesh(jax.eval_shape(state_of, 0, 0.0), one)),
            ("stage_step", lambda *_: self._step),
            ("open_batches", lambda *_, **__: Numbers()),
            ("place", lambda batch, mesh: batch),
            ("Report", Judging),
        ):
            monkeypatch.setattr(loop, name, stand_in)

    def run(self, steps: int = 1000) -> float | None:
        """The sum; None if it was interrupted after so many steps."""
        self._left = steps
        with suppress(KeyboardInterrupt):
            params = loop.train(self.config, Tokenizer.bytes_only(), None, single_device_mesh())
            return float(params["sum"])

    def _step(self, state, batch, rate):
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        state = state_of(state.step + 1, state.params["sum"] * 1.5 + batch)
        bad = jnp.int32(batch in self._bad)
        return state, {"loss": state.params["sum"], "grad_norm": jnp.float32(0), "bad": bad}


def state_of(step, total) -> TrainState:
    rng = jnp.zeros(2, jnp.uint32)
    return TrainState(jnp.int32(step), {"sum": jnp.float32(total)}, (), rng, None, begin_guard())


@pytest.mark.parametrize(
    ("bad", "learned"),
    [
        ({6}, [*range(4), *range(7, 17)]),  # from step 4, past 4, 5 and 6
        ({7}, [*range(4), *range(8, 18)]),  # found when step 8 was to be saved
        ({6, 8}, [*range(4), *range(9, 19)]),  # twice from the same step
        ({1}, range(2, 16)),  # before the first save
    ],
)
def test_a_rollback_goes_on_past_the_bad_batch_also_after_a_kill(
    bad, learned, sentences, tmp_path, monkeypatch, caplog
):
    total = 0.0
    for number in learned:
        total = float(np.float32(np.float32(total * 1.5) + number))
    whole = Walk(tmp_path / "whole", sentences, bad, monkeypatch)
    assert whole.run() == total
    assert len((tmp_path / "whole" / FILE).read_text().splitlines()) == len(bad)
    assert f"past {min(bad) + 1 - min(bad) // 4 * 4} batches" in caplog.text
    killed = Walk(tmp_path / "killed", sentences, bad, monkeypatch)
    ends = [killed.run(steps) for steps in (2, 5, 7, 9, 6, 1000)]
    assert total in ends and set(ends) <= {None, total}
