"""Rotary position embedding with Llama 3's frequency scaling; Hugging Face's order (halves)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from l32jax.config import RopeScaling


def frequencies(
    head_dim: int, *, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, "half"]:
    """Radians per position of each rotary pair, in float32 (computed in float64).

    With `scaling`, wavelengths beyond the original context are stretched by `factor`, those
    shorter than original_context / high_freq_factor are kept, and those between are blended
    (Llama 3.1; `apply_scaling` in llama-models, but with the factor read from the config).
    """
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain.astype(np.float32)
    turns = scaling.original_context * plain / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (kept * plain + (1 - kept) * plain / scaling.factor).astype(np.float32)


def cos_sin(
    positions: Int[Array, "b t"], freqs: Float[np.ndarray, "half"]
) -> tuple[Float[Array, "b t half"], Float[Array, "b t half"]]:
    angles = positions[..., None].astype(jnp.float32) * freqs
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b t n h"], cos: Float[Array, "b t half"], sin: Float[Array, "b t half"]
) -> Float[Array, "b t n h"]:
    """Turns each pair (x[i], x[i + h/2]) by its angle, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
