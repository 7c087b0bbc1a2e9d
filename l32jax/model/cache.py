"""Keys and values kept between the steps of generation; passed and returned, never an attribute."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l32jax.config import LlamaConfig
from l32jax.kernels import laid_out_as_read
from l32jax.sharding import activation_spec


class KeyValue(NamedTuple):
    """Heads-major, as kernels read them: a head's keys lie end to end.

    A cache holds those of all layers of a kind, stacked, and never hands out a layer: a slice
    would be a copy, where kernels read what they need in place.
    """

    key: Float[Array, "*l b k s h"]
    value: Float[Array, "*l b k s h"]

    @classmethod
    def of(cls, key: Float[Array, "b s k h"], value: Float[Array, "b s k h"]) -> "KeyValue":
        return cls(key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3))

    @property
    def num_keys(self) -> int:
        return self.key.shape[-2]

    def write(
        self, new: "KeyValue", layer: Int[Array, ""], at: Int[Array, "b"] | None = None
    ) -> "KeyValue":
        """`new` in place of what row b of a layer holds from slot at[b] on, or from its first."""
        at = jnp.zeros(new.key.shape[0], jnp.int32) if at is None else at
        of_new, of_rows = activation_spec("bksh"), activation_spec("b")
        new = KeyValue(*(jax.sharding.reshard(array, of_new) for array in new))
        at = jax.sharding.reshard(at, of_rows)
        stacked = activation_spec("lbksh")
        specs = (stacked, of_new, activation_spec(""), of_rows)
        run = jax.shard_map(_write, in_specs=specs, out_specs=stacked, check_vma=False)
        return KeyValue(*(run(o, n, layer, at) for o, n in zip(self, new, strict=True)))


def _write(old, new, layer, at):
    """Row by row: XLA would rather copy all layers than scatter into several rows in place."""

    def write_row(row, old):
        rows = jax.lax.dynamic_slice_in_dim(new, row, 1)[None].astype(old.dtype)
        old = jax.lax.dynamic_update_slice(old, rows, (layer, row, 0, at[row], 0))
        return laid_out_as_read(old)

    return jax.lax.fori_loop(0, new.shape[0], write_row, old)


# One stacked KeyValue per slot of the group pattern.
Cache = tuple[KeyValue, ...]


def empty_cache(
    config: LlamaConfig, *, batch: int, length: int, vision_length: int, dtype: Any
) -> Cache:
    """Zeros for `length` text tokens and `vision_length` image tokens in each row."""
    decoder = config.decoder
    lengths = {"self": length, "cross": vision_length}

    def slot(kind):
        shape = (decoder.num_groups, batch, decoder.num_kv_heads, lengths[kind], decoder.head_dim)
        spec = activation_spec("lbksh")
        return KeyValue(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2)))

    return tuple(slot(kind) for kind in decoder.group_pattern)
