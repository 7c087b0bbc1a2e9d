"""What the backward pass finds saved of a layer, and what it computes again."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from l32jax.kernels import SAVED_NAMES

# Of `run_config.TrainConfig.saved`. Attention's outputs are small beside the time it takes to
# compute them again in a long row.
Saved = Literal["everything", "dots", "attention", "nothing"]
_attention = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _attention
    ),
    "attention": _attention,
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


def remat(body: Callable[..., Any], saved: Saved) -> Callable[..., Any]:
    """The body of a scan over layers, with only that of it saved."""
    if saved == "everything":
        return body
    return jax.checkpoint(body, policy=REMAT_POLICIES[saved])
