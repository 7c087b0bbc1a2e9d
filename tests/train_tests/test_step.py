"""One step: what it lowers, what it leaves alone, and how often it is traced."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.data.batches import place
from l32jax.model.llama import batch_logits, bind
from l32jax.model.parameters import flatten, trains
from l32jax.sharding import single_device_mesh
from l32jax.train.objectives import next_token
from l32jax.train.step import init_state, make_train_step
from tests.train_tests.small import MODEL, rows, stage
from tests.train_tests.traces import equations

NUM_STEPS = 6
PARTS = ("language_model", "vision_tower", "adapter")


class Trained:
    """A stage of a few steps on one batch, beside what it started from."""

    def __init__(self, parts, *, images: bool):
        self.stage, self.traces, self.metrics = stage(parts), 0, []
        mesh = single_device_mesh()
        objective = partial(next_token, dtype=jnp.float32, saved="everything")

        def counted(model, batch, rng):
            self.traces += 1
            return objective(model, batch, rng)

        with jax.set_mesh(mesh):
            state = jax.jit(partial(init_state, MODEL, self.stage, 0))()
            self.before = jax.tree.map(np.array, state)
            step = make_train_step(MODEL, self.stage, counted)
            batch = place(rows(4, images=images), mesh)
            for _ in range(NUM_STEPS):
                state, metrics = step(state, batch, jnp.float32(1e-2))
                self.metrics.append(jax.tree.map(float, metrics))
            self.after = jax.tree.map(np.array, state)

    def changed(self) -> dict[str, bool]:
        before, after = flatten(self.before.params), flatten(self.after.params)
        return {path: not np.array_equal(leaf, after[path]) for path, leaf in before.items()}


@pytest.fixture(scope="module")
def whole() -> Trained:
    return Trained(PARTS, images=True)


@pytest.fixture(scope="module")
def adapter() -> Trained:
    return Trained(("vision_tower", "adapter"), images=True)


def test_steps_lower_the_loss_and_trace_once(whole, adapter):
    for trained in (whole, adapter):
        losses = [metrics["loss"] for metrics in trained.metrics]
        assert all(np.isfinite(list(metrics.values())).all() for metrics in trained.metrics)
        assert trained.traces == 1
        assert int(trained.after.step) == NUM_STEPS
        assert losses[-1] < losses[0]
    assert whole.metrics[0]["loss"] == pytest.approx(np.log(MODEL.decoder.vocab_size), rel=0.15)
    assert whole.metrics[-1]["loss"] < 0.7 * whole.metrics[0]["loss"]


def test_every_parameter_of_the_model_learns(whole):
    """Also those behind gates that start closed: a parameter that never moves is a dead one."""
    assert [path for path, changed in whole.changed().items() if not changed] == []


def test_frozen_parts_stay_as_they_are_bit_by_bit(adapter):
    is_trainable = trains(adapter.stage.trains, MODEL)
    changed = adapter.changed()
    assert len(changed) > 50
    assert {path for path, moved in changed.items() if moved} == set(filter(is_trainable, changed))


def test_frozen_parts_have_no_optimizer_state(adapter):
    is_trainable = trains(adapter.stage.trains, MODEL)
    names = flatten(adapter.after.opt_state)
    moments = [name for name in names if not name.endswith("count")]
    for path in flatten(adapter.after.params):
        of_path = [name for name in moments if name.endswith(f"/{path}")]
        assert len(of_path) == (2 if is_trainable(path) else 0), path
    assert len(moments) == 2 * len(list(filter(is_trainable, flatten(adapter.after.params))))


def test_no_gradient_of_a_frozen_weight_is_computed():
    """Its matrix product with the transposed activations would have the weight's shape."""
    frozen = MODEL.decoder.mlp_dim, MODEL.decoder.embed_dim  # up and gate of the language model

    def products(parts) -> int:
        chosen = stage(parts)
        objective = partial(next_token, dtype=jnp.float32, saved="everything")
        step = make_train_step(MODEL, chosen, objective)
        mesh = single_device_mesh()
        with jax.set_mesh(mesh):
            state = jax.eval_shape(partial(init_state, MODEL, chosen, 0))
            batch = place(rows(4, images=False), mesh)
            jaxpr = jax.make_jaxpr(step)(state, batch, jnp.float32(0)).jaxpr
        return sum(
            equation.primitive.name == "dot_general"
            and tuple(sorted(equation.outvars[0].aval.shape)) == tuple(sorted(frozen))
            for equation in equations(jaxpr)
        )

    assert products(("language_model",)) == 3
    assert products(("vision_tower", "adapter")) == 0


def test_training_the_adapter_does_not_change_what_text_scores(adapter):
    batch = rows(4, images=False)
    mesh = single_device_mesh()

    @jax.jit
    def scores(params, batch):
        return batch_logits(bind(MODEL, params), batch)

    with jax.set_mesh(mesh):
        before, after = (
            np.asarray(scores(state.params, place(batch, mesh)))
            for state in (adapter.before, adapter.after)
        )
    np.testing.assert_array_equal(after, before)


def test_rows_without_weight_do_not_change_the_loss():
    mesh, batch = single_device_mesh(), rows(4, images=False)
    empty = {name: np.concatenate([array, np.zeros_like(array)]) for name, array in batch.items()}

    @jax.jit
    def loss(params, batch):
        model = bind(MODEL, params)
        key = jax.random.key(0)
        return next_token(model, batch, key, dtype=jnp.float32, saved="everything")[0]

    with jax.set_mesh(mesh):
        params = jax.jit(partial(init_state, MODEL, stage(PARTS), 0))().params
        one, other = (float(loss(params, place(b, mesh))) for b in (batch, empty))
    assert other == pytest.approx(one, rel=1e-6)
