"""The optimizer of a stage, from its config (optax)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import Array

from l32jax.model.matrices import MatrixDims, is_projection, matrix_dims
from l32jax.model.parameters import Params, path_name
from l32jax.run_config import OptimizerConfig
from l32jax.train.factored import scale_by_factored_moments

DECAYED = ("/weight", "/lora_a", "/lora_b")
MUON_RMS = 0.2  # of an update, as AdamW's are: the same rates fit (Liu et al., 2025, section 2.2)


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
    """The optimizer for a learning rate of 1; weight decay spares norms, biases, gates, positions.

    The rate multiplies its updates from outside: stages that differ in nothing else then share
    one compiled step.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _KINDS[config.kind](config),
        optax.masked(optax.scale(config.gate_rate), _ending("gate")),
    )


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.adamw(
        1.0,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        mu_dtype=config.momentum,
        weight_decay=config.weight_decay,
        mask=_ending(DECAYED),
    )


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    momentum = optax.ema(config.beta1, debias=False, accumulator_dtype=config.momentum)
    return optax.chain(
        scale_by_factored_moments(config.beta2, config.epsilon),
        momentum if config.beta1 else optax.identity(),
        optax.scale(-1.0),
        _decay(config),
    )


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    orthogonal = optax.chain(
        _compiler_sharded(
            optax.contrib.scale_by_muon(
                beta=config.beta1,
                eps=config.epsilon,
                mu_dtype=config.momentum,
                weight_dimension_numbers=_muon_dims,
            )
        ),
        optax.stateless(_scaled_by_shape),
        optax.scale(-1.0),
        _decay(config),
    )
    return optax.partition({"muon": orthogonal, "adamw": _adamw(config)}, _muon_or_adamw)


_KINDS = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}


def _decay(config: OptimizerConfig) -> optax.GradientTransformation:
    """Of what goes downhill already."""
    return optax.add_decayed_weights(-config.weight_decay, _ending(DECAYED))


def _muon_or_adamw(params: Params) -> Params:
    """Muon is for the matrices that multiply activations."""
    return jax.tree.map_with_path(
        lambda path, _: "muon" if is_projection(path_name(path)) else "adamw", params
    )


def _dims(path: tuple, leaf: Array) -> MatrixDims:
    dims = matrix_dims(path_name(path), leaf.ndim)
    assert dims is not None
    return dims


def _muon_dims(params: Params) -> Params:
    def dims(path, leaf):
        rows, columns = _dims(path, leaf)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=columns, output_axis=rows)

    return jax.tree.map_with_path(dims, params)


def _scaled_by_shape(updates: Params, _: Params | None) -> Params:
    def scaled(path, update):
        rows, columns = (
            math.prod(update.shape[dim] for dim in dims) for dims in _dims(path, update)
        )
        return MUON_RMS * max(rows, columns) ** 0.5 * update

    return jax.tree.map_with_path(scaled, updates)


def _compiler_sharded(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """On a mesh the compiler finds out where intermediate values live: products of a matrix with
    itself have no place that its own sharding would name."""

    def update(updates, state, params=None):
        if jax.sharding.get_abstract_mesh().empty:
            return inner.update(updates, state, params)
        specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (updates, state))
        automatic: Any = jax.sharding.auto_axes(inner.update, out_sharding=specs)
        return automatic(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _ending(suffix: str | tuple[str, ...]) -> Callable[[Params], Params]:
    """The mask of the parameters whose names end like this."""
    return partial(jax.tree.map_with_path, lambda path, _: path_name(path).endswith(suffix))
