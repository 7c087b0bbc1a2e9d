"""What objectives tell of models with random parameters, and what formulas are worked out from."""

from typing import Any

import jax
import numpy as np

from l32jax.data.batches import place
from l32jax.model.llama import batch_logits, bind
from l32jax.model.parameters import flatten
from l32jax.sharding import single_device_mesh
from tests.checkpoint_tests.weights import random_params

ONE = single_device_mesh()


def sums(objective: Any, config, batch, mesh=ONE, *, seed=0, others=()) -> dict[str, float]:
    with jax.set_mesh(mesh):
        beside = {name: random_params(config, mesh, seed=s) for name, s in others}

        @jax.jit
        def run(params, beside, batch):
            models = {name: bind(config, each) for name, each in beside.items()}
            return objective(bind(config, params), batch, jax.random.key(0), **models)[1]

        found = run(random_params(config, mesh, seed=seed), beside, place(batch, mesh))
    return jax.tree.map(float, found)


def gradients(objective: Any, config, batch, mesh=ONE) -> dict[str, np.ndarray]:
    def loss(params, batch):
        return objective(bind(config, params), batch, jax.random.key(0))[0]

    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss))(random_params(config, mesh), place(batch, mesh))
    return {path: np.asarray(leaf) for path, leaf in flatten(found).items()}


def logits_of(config, batch, seed) -> np.ndarray:
    with jax.set_mesh(ONE):
        run = jax.jit(lambda p, b: batch_logits(bind(config, p), b))
        return np.asarray(run(random_params(config, seed=seed), place(batch, ONE)), np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def of_targets(logs: np.ndarray, batch) -> np.ndarray:
    return np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]


def logs_of(config, batch, seed) -> np.ndarray:
    """Log-probabilities of targets, from all logits at once."""
    return of_targets(log_softmax(logits_of(config, batch, seed)), batch)
