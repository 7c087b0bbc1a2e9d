"""Self-attention with rotary positions, and cross-attention to image tokens."""

from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from l32jax.config import DecoderConfig
from l32jax.kernels.reference import attention
from l32jax.model.cache import KeyValue
from l32jax.model.layers import Projection, RMSNorm
from l32jax.model.rope import rotate


class Interval(NamedTuple):
    """The keys [start, stop) that each query row sees."""

    start: Int[Array, "b t"]
    stop: Int[Array, "b t"]


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
        self.query = Projection(sizes, "d", "nh", rngs=rngs)
        self.key = Projection(sizes, "d", "kh", rngs=rngs)
        self.value = Projection(sizes, "d", "kh", rngs=rngs)
        self.out = Projection(sizes, "nh", "d", rngs=rngs)
        self.scale = config.head_dim**-0.5

    def attend(
        self, q: Float[Array, "b t n h"], kv: KeyValue, sees: Interval
    ) -> Float[Array, "b t d"]:
        return self.out(attention(q, kv.key, kv.value, *sees, scale=self.scale))


class SelfAttention(Heads):
    def __call__(
        self,
        x: Float[Array, "b t d"],
        rotation: Rotation,
        sees: Interval,
        cache: KeyValue | None,
        write_at: Int[Array, "b"] | None,
    ) -> tuple[Float[Array, "b t d"], KeyValue | None]:
        """With a cache, new keys go in at slot `write_at` of each row, and `sees` counts slots."""
        kv = KeyValue(rotate(self.key(x), *rotation), self.value(x))
        if cache is not None:
            assert write_at is not None
            kv = cache = cache.write(kv, write_at)
        return self.attend(rotate(self.query(x), *rotation), kv, sees), cache


class CrossAttention(Heads):
    """Normalised queries and keys, no positions: images have theirs from the encoder."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps)

    def keys_and_values(self, vision: Float[Array, "b s d"]) -> KeyValue:
        """What generation computes once per image."""
        return KeyValue(self.key_norm(self.key(vision)), self.value(vision))

    def __call__(
        self, x: Float[Array, "b t d"], kv: KeyValue, sees: Interval
    ) -> Float[Array, "b t d"]:
        return self.attend(self.query_norm(self.query(x)), kv, sees)
