"""The optimizer of a stage, from its config (optax)."""

import jax
import optax

from l32jax.config import OptimizerConfig
from l32jax.model.parameters import Params, path_name


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then the decay, which ends with the stage."""
    peak, final, warmup = config.peak_lr, config.final_lr, config.warmup_steps
    decay_steps = max(num_steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=final / peak),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return decay
    # The first step already learns; the peak is reached at step `warmup_steps`.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW; weight decay spares norms, biases, gates and position tables."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_decays,
        ),
    )


def _decays(params: Params) -> Params:
    return jax.tree.map_with_path(lambda path, _: path_name(path).endswith("/weight"), params)
