"""The decoder of Llama 3.2: text, with or without cross-attention to images."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from l32jax.config import AttentionConfig, DecoderConfig, LlamaConfig
from l32jax.kernels.context import Layout
from l32jax.model.attention import CrossAttention, Interval, Rotation, SelfAttention, Sight
from l32jax.model.cache import Cache, KeyValue
from l32jax.model.layers import RMSNorm, SwiGLU, gate_param, normal_param
from l32jax.model.lookup import look_up
from l32jax.model.remat import Saved, remat
from l32jax.model.rope import cos_sin, frequencies
from l32jax.sharding import activation_spec, stream_spec

NUM_IMAGE_EMBEDDINGS = 8  # Meta's table of extra embeddings; only row 0 is ever used


class Context(NamedTuple):
    """What every block sees beside the residual stream.

    `images` is None in a text-only call, and then cross-attention blocks are the identity;
    `sees_image` says which rows their MLP is for.
    `vision` is None while decoding: keys and values of the images are in the cache.
    `stream` is where the residual stream lives.
    """

    rotation: Rotation
    text: Sight
    images: Sight | None
    sees_image: Bool[Array, "b t"] | None
    vision: Float[Array, "b s d"] | None
    write_at: Int[Array, "b"] | None
    stream: PartitionSpec


class SelfBlock(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.attention = SelfAttention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.mlp = SwiGLU(config.embed_dim, config.mlp_dim, lora=config.lora, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: Context,
        cache: KeyValue | None,
        layer: Int[Array, ""],
    ):
        y, cache = self.attention(
            whole(self.attention_norm(x)),
            context.rotation,
            context.text,
            cache,
            layer,
            context.write_at,
            context.stream,
        )
        x = x + y
        return x + self.mlp(whole(self.mlp_norm(x)), context.stream), cache


class CrossBlock(nnx.Module):
    """Adds what the images say, through gates that open from zero during training."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.attention = CrossAttention(config, rngs=rngs)
        self.attention_gate = gate_param()
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.mlp = SwiGLU(config.embed_dim, config.mlp_dim, lora=config.lora, rngs=rngs)
        self.mlp_gate = gate_param()

    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: Context,
        cache: KeyValue | None,
        layer: Int[Array, ""],
    ):
        if context.images is None or context.sees_image is None:
            return x, cache
        y, cache = self.attention(
            whole(self.attention_norm(x)),
            context.vision,
            context.images,
            cache,
            layer,
            context.stream,
        )
        x = x + jnp.tanh(self.attention_gate[...]).astype(x.dtype) * y
        gate = jnp.tanh(self.mlp_gate[...]).astype(x.dtype) * context.sees_image[..., None]
        return x + gate * self.mlp(whole(self.mlp_norm(x)), context.stream), cache


def whole(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """From the residual stream to where products take it."""
    return jax.sharding.reshard(x, activation_spec("btd"))


BLOCKS = {"self": SelfBlock, "cross": CrossBlock}


class Group(nnx.Module):
    """The repeating unit of the decoder, and the body of its scan."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([BLOCKS[kind](config, rngs=rngs) for kind in config.group_pattern])

    def __call__(
        self, x: Float[Array, "b t d"], context: Context, saved: Saved
    ) -> Float[Array, "b t d"]:
        """Without caches. Neighbours of one kind are compiled once, and each block saves its own:
        what is computed again of a group is never there all at once.
        """

        def run_block(x, block):
            return block(x, context, None, jnp.int32(0))[0]

        run_block = remat(run_block, saved)
        for _, alike in itertools.groupby(self.blocks, type):
            first, *more = alike
            if not more:
                x = run_block(x, first)
                continue
            stacked = jax.tree.map(lambda *weights: jnp.stack(weights), first, *more)
            x, _ = jax.lax.scan(lambda x, block: (run_block(x, block), None), x, stacked)
        return x

    def with_caches(
        self, x: Float[Array, "b t d"], context: Context, cache: Cache, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """`layer` is the place of this group in the stack, and in the caches."""
        written = []
        for slot, block in enumerate(self.blocks):
            x, kv = block(x, context, cache[slot], layer)
            written.append(kv)
        return x, tuple(written)


class Decoder(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        decoder = config.decoder
        table = (decoder.vocab_size, decoder.embed_dim)
        scale = decoder.embed_dim**-0.5
        self.embedding = Table("vd", table, scale, rngs=rngs)
        if config.vision is not None:
            extra = (NUM_IMAGE_EMBEDDINGS, decoder.embed_dim)
            self.image_embedding = Table("_d", extra, scale, rngs=rngs)
        keys = jax.random.split(rngs.params(), decoder.num_groups)
        self.groups = jax.vmap(lambda key: Group(decoder, rngs=nnx.Rngs(key)))(keys)
        self.final_norm = RMSNorm(decoder.embed_dim, decoder.norm_eps)
        if not decoder.tied_embedding:
            self.head = Table("vd", table, scale, rngs=rngs)
        if config.reward_head:
            self.reward_head = Table("_d", (1, decoder.embed_dim), scale, rngs=rngs)
        self.config = config

    def embed(self, tokens: Int[Array, "b t"], dtype: jnp.dtype) -> Float[Array, "b t d"]:
        """Ids beyond the vocabulary are image tokens and have a small table of their own."""
        x = look_up(self.embedding.weight[...], tokens, dtype)
        if self.config.vision is None:
            return x
        spec, vocab_size = activation_spec("btd"), self.config.decoder.vocab_size
        extra = self.image_embedding.weight[...].astype(dtype)
        image = extra.at[jnp.maximum(tokens - vocab_size, 0)].get(out_sharding=spec)
        return jnp.where((tokens >= vocab_size)[..., None], image, x)

    def context(
        self,
        positions: Int[Array, "b t"],
        text: Interval,
        images: Interval | None = None,
        *,
        vision: Float[Array, "b s d"] | None = None,
        cache: Cache | None = None,
        write_at: Int[Array, "b"] | None = None,
        attention: AttentionConfig,
        dtype: Any,
    ) -> Context:
        """What does not depend on the layer is computed here, once."""
        decoder = self.config.decoder
        freqs = frequencies(
            decoder.head_dim, theta=decoder.rope_theta, scaling=decoder.rope_scaling
        )
        rotation = Rotation(*cos_sin(positions, freqs))
        batch, time = positions.shape
        kept = {k: kv.num_keys for k, kv in zip(decoder.group_pattern, cache or (), strict=False)}
        sight = partial(self._sight, attention, dtype)
        seen = sight(text, batch, time, "btkh" if cache is None else "bskh", kept.get("self", time))
        stream = stream_spec(time)
        if images is None:
            return Context(rotation, seen, None, None, vision, write_at, stream)
        sees_image = images.stop > images.start
        num_keys = kept["cross"] if vision is None else vision.shape[1]
        if self.config.compat.row_mask == "hf":  # rows without an image attend to all of them
            stop = jnp.where(sees_image, images.stop, num_keys)
            images = Interval(images.start * sees_image, stop)
        shared = vision is not None and jax.typeof(vision).sharding.spec[1] is not None
        keys = "btkh" if shared else "bskh"
        attended = sight(images, batch, time, keys, num_keys, order="contiguous")
        sees_image = jax.sharding.reshard(sees_image, PartitionSpec(*stream[:2]))
        return Context(rotation, seen, attended, sees_image, vision, write_at, stream)

    def _sight(
        self,
        how: AttentionConfig,
        dtype,
        sees: Interval,
        batch: int,
        time: int,
        dims,
        num_keys,
        order: Layout = "balanced",
    ) -> Sight:
        decoder = self.config.decoder
        queries = (batch, time, decoder.num_heads, decoder.head_dim)
        keys = (batch, num_keys, decoder.num_kv_heads, decoder.head_dim)
        of_keys = {"keys": (dims, keys), "order": order}
        return Sight.of(sees, how, queries=("btnh", queries), dtype=dtype, **of_keys)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: Context,
        cache: Cache | None = None,
        *,
        saved: Saved = "everything",
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """From embeddings to the normalised states that `logits` reads."""

        x = jax.sharding.reshard(x, context.stream)
        if cache is None:
            x, _ = jax.lax.scan(lambda x, group: (group(x, context, saved), None), x, self.groups)
            return whole(self.final_norm(x)), None

        def run_group(carry, group_and_layer):
            x, cache = carry
            group, layer = group_and_layer
            return group.with_caches(x, context, cache, layer), None

        # Rolled while decoding too. SmolLM2-135M on 2 CPU cores: a token takes 0.10 s rolled and
        # 0.24 s unrolled in float32, 0.65 and 0.5 s in bfloat16; compiling takes 8 and 20 to 40 s.
        layers = jnp.arange(self.config.decoder.num_groups)
        (x, cache), _ = jax.lax.scan(run_group, (x, cache), (self.groups, layers))
        return whole(self.final_norm(x)), cache

    def scoring_table(self) -> Float[Array, "v d"]:
        """What states are scored against: on each device whole rows, of its share of the words."""
        table = self.embedding if self.config.decoder.tied_embedding else self.head
        return jax.sharding.reshard(table.weight[...], activation_spec("vd"))

    def logits(
        self, x: Float[Array, "b t d"], table: Float[Array, "v d"] | None = None
    ) -> Float[Array, "b t v"]:
        """Float32 scores of the next token.

        Args:
          table: that of `scoring_table`, where it is fetched once and used many times.
        """
        table = self.scoring_table() if table is None else table
        return jnp.einsum(
            "btd,vd->btv",
            x,
            table.astype(x.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=activation_spec("btv"),
        )

    def rewards(self, x: Float[Array, "b t d"]) -> Float[Array, "b t"]:
        """What the document up to each place is worth, in float32."""
        weight = self.reward_head.weight[...].astype(x.dtype)
        return jnp.einsum(
            "btd,d->bt",
            x,
            weight[0],
            preferred_element_type=jnp.float32,
            out_sharding=activation_spec("bt"),
        )


class Table(nnx.Module):
    """Rows to look up, or to score against."""

    def __init__(self, dims: str, shape: tuple[int, int], scale: float, *, rngs: nnx.Rngs):
        self.weight = normal_param(rngs, dims, shape, scale)
