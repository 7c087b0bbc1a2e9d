"""Self-attention with rotary positions, and cross-attention to image tokens."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from l32jax import kernels
from l32jax.config import AttentionConfig, DecoderConfig
from l32jax.kernels.context import Layout
from l32jax.model.cache import KeyValue
from l32jax.model.layers import Projection, RMSNorm, lora_of
from l32jax.model.rope import rotate
from l32jax.sharding import activation_spec


class Interval(NamedTuple):
    """The keys [start, stop) that each query row sees."""

    start: Int[Array, "b t"]
    stop: Int[Array, "b t"]


class Sight(NamedTuple):
    """Intervals as layers share them: with what the kernel needs to know of them, and its name.

    order: of the keys, where they are split over the context axis.
    """

    interval: Interval
    plan: Any
    how: AttentionConfig
    order: Layout

    @classmethod
    def of(
        cls,
        interval: Interval,
        how: AttentionConfig,
        *,
        queries: tuple[str, tuple[int, ...]],
        keys: tuple[str, tuple[int, ...]],
        dtype: Any,
        order: Layout = "balanced",
    ) -> "Sight":
        """`queries` and `keys` are the dims (see `sharding`) and the shape of one layer's."""
        mesh = jax.sharding.get_abstract_mesh()
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, activation_spec(dims)))
            for dims, shape in (queries, keys)
        ]
        plan = kernels.make_plan(*interval, *shapes, impl=how.impl, across=how.across, order=order)
        return cls(interval, plan, how, order)

    def attend(
        self, q: Float[Array, "b t n h"], kv: KeyValue, *, scale: float
    ) -> Float[Array, "b t n h"]:
        key, value = (array.transpose(0, 2, 1, 3) for array in kv)
        return kernels.attention(
            q,
            key,
            value,
            self.interval.start,
            self.interval.stop,
            scale=scale,
            impl=self.how.impl,
            across=self.how.across,
            order=self.order,
            plan=self.plan,
        )

    def attend_to_cache(
        self, q: Float[Array, "b t n h"], cache: KeyValue, layer: Int[Array, ""], *, scale: float
    ) -> Float[Array, "b t n h"]:
        return kernels.cached_attention(
            q, *cache, layer, *self.interval, scale=scale, impl=self.how.impl, plan=self.plan
        )


class Rotation(NamedTuple):
    cos: Float[Array, "b t half"]
    sin: Float[Array, "b t half"]


class Heads(nnx.Module):
    """The four projections that self- and cross-attention share."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        sizes = {
            "d": config.embed_dim,
            "n": config.num_heads,
            "k": config.num_kv_heads,
            "h": config.head_dim,
        }
        lora = config.lora
        self.query = Projection(sizes, "d", "nh", lora=lora_of(lora, "query"), rngs=rngs)
        self.key = Projection(sizes, "d", "kh", lora=lora_of(lora, "key"), rngs=rngs)
        self.value = Projection(sizes, "d", "kh", lora=lora_of(lora, "value"), rngs=rngs)
        self.out = Projection(sizes, "nh", "d", lora=lora_of(lora, "out"), rngs=rngs)
        self.scale = config.head_dim**-0.5


class SelfAttention(Heads):
    def __call__(
        self,
        x: Float[Array, "b t d"],
        rotation: Rotation,
        sees: Sight,
        cache: KeyValue | None,
        layer: Int[Array, ""],
        write_at: Int[Array, "b"] | None,
        to: PartitionSpec,
    ) -> tuple[Float[Array, "b t d"], KeyValue | None]:
        """With a cache, new keys go in at slot `write_at` of each row, and `sees` counts slots.

        `to` is where the result lives.
        """
        kv = KeyValue.of(rotate(self.key(x), *rotation), self.value(x))
        q = rotate(self.query(x), *rotation)
        if cache is None:
            return self.out(sees.attend(q, kv, scale=self.scale), to), None
        cache = cache.write(kv, layer, write_at)
        return self.out(sees.attend_to_cache(q, cache, layer, scale=self.scale), to), cache


class CrossAttention(Heads):
    """Normalised queries and keys, no positions: images have theirs from the encoder."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps)

    def keys_and_values(self, vision: Float[Array, "b s d"]) -> KeyValue:
        """What generation computes once per image."""
        return KeyValue.of(self.key_norm(self.key(vision)), self.value(vision))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        vision: Float[Array, "b s d"] | None,
        sees: Sight,
        cache: KeyValue | None,
        layer: Int[Array, ""],
        to: PartitionSpec,
    ) -> tuple[Float[Array, "b t d"], KeyValue | None]:
        """To image tokens, which stay in the cache; without any, to those that are there."""
        q = self.query_norm(self.query(x))
        if vision is None:
            assert cache is not None, "without a cache, cross-attention needs the images themselves"
            return self.out(sees.attend_to_cache(q, cache, layer, scale=self.scale), to), cache
        kv = self.keys_and_values(vision)
        cache = None if cache is None else cache.write(kv, layer)
        return self.out(sees.attend(q, kv, scale=self.scale), to), cache
