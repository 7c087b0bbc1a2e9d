"""What the backward pass finds saved of a layer, and what it computes again."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from l32jax.kernels import SAVED_NAMES

# Of `run_config.TrainConfig.saved`. Attention's outputs are small beside the time it takes to
# compute them again in a long row.
Saved = Literal["everything", "dots", "attention", "nothing"]
_attention = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
PRODUCT = "product"  # of a weight and activations, in their dtype
REMAT_POLICIES = {
    # Not JAX's own policy for dots: that saves the float32 in which they are accumulated, and but
    # for TPUs' compiler, which rounds within the product, it takes twice the memory.
    "dots": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES, PRODUCT),
    "attention": _attention,
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


def remat(body: Callable[..., Any], saved: Saved) -> Callable[..., Any]:
    """The body of a scan over layers, with only that of it saved."""
    if saved == "everything":
        return body
    return jax.checkpoint(body, policy=REMAT_POLICIES[saved])
