"""Rotary position embedding with Llama 3's frequency scaling; Hugging Face's order (halves)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from l32jax.config import RopeScaling


def frequencies(
    head_dim: int, *, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, "half"]:
    """Radians per position of each rotary pair.

    With `scaling`, wavelengths beyond the original context are stretched by `factor`, those
    shorter than original_context / high_freq_factor are kept, and those between are blended
    (Llama 3.1; `apply_scaling` in llama-models, but with the factor read from the config).

    Rounded to float32 where the code rounds that the models were trained with (torch's power is
    exact to the last place): one unit in the last place is 0.006 radians at position 100,000.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float64(theta) ** exponents.astype(np.float64)
    plain = np.float32(1) / powers.astype(np.float32)
    if scaling is None:
        return plain
    wavelength = np.float32(2 * math.pi) / plain
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    turns = np.float32(scaling.original_context) / wavelength
    stretched = plain / np.float32(scaling.factor)
    share = (turns - low) / (high - low)
    blended = (1 - share) * stretched + share * plain
    return np.where(turns < low, stretched, np.where(turns > high, plain, blended))


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
