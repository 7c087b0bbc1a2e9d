"""The model that a policy is held against, as a part of its stage's state."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from l32jax.config import Stored
from l32jax.model.parameters import Params
from l32jax.objective_config import Dpo, Grpo, Objective, keeps_reference


def begin_reference(objective: Objective, trainable: Params, frozen: Stored) -> Params | None:
    """A copy of what trains; bfloat16 if it stays, unless frozen parameters are float32."""
    if not keeps_reference(objective):
        return None
    exact = _is_moving(objective) or frozen == "float32"
    dtype = jnp.float32 if exact else jnp.bfloat16
    return optax.tree.cast(jax.tree.map(jnp.copy, trainable), dtype)


def moved(
    objective: Objective, reference: Params | None, trainable: Params, done: Int[Array, ""]
) -> Params | None:
    """The reference after `done` steps; of an average, a part of the way to the policy."""
    if reference is None or not _is_moving(objective):
        return reference
    assert isinstance(objective, Dpo | Grpo)
    decay = jnp.where(done % objective.refresh_every == 0, objective.ema_decay, 1.0)
    return jax.tree.map(lambda r, p: decay * r + (1 - decay) * p, reference, trainable)


def _is_moving(objective: Objective) -> bool:
    return isinstance(objective, Dpo | Grpo) and objective.reference == "ema"
