"""Keys and values kept between the steps of generation; passed and returned, never an attribute."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l32jax.config import LlamaConfig
from l32jax.sharding import activation_spec


class KeyValue(NamedTuple):
    key: Float[Array, "*l b s k h"]
    value: Float[Array, "*l b s k h"]

    def write(self, new: "KeyValue", at: Int[Array, "b"]) -> "KeyValue":
        """`new` in place of what each row b holds from slot at[b] on."""

        def write_row(old, rows, slot):
            return jax.lax.dynamic_update_slice(old, rows.astype(old.dtype), (slot, 0, 0))

        return KeyValue(*(jax.vmap(write_row)(o, n, at) for o, n in zip(self, new, strict=True)))


# One stacked KeyValue per slot of the group pattern.
Cache = tuple[KeyValue, ...]


def empty_cache(
    config: LlamaConfig, *, batch: int, length: int, vision_length: int, dtype: Any
) -> Cache:
    """Zeros for `length` text tokens and `vision_length` image tokens in each row."""
    decoder = config.decoder
    lengths = {"self": length, "cross": vision_length}

    def slot(kind):
        shape = (decoder.num_groups, batch, lengths[kind], decoder.num_kv_heads, decoder.head_dim)
        spec = activation_spec("lbskh")
        return KeyValue(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2)))

    return tuple(slot(kind) for kind in decoder.group_pattern)
