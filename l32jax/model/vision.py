"""The tiled image encoder of Llama 3.2 Vision (llama-models, `multimodal/model.py`)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from l32jax.config import CLIP_MEAN, CLIP_STD, AttentionConfig, LlamaConfig, VisionConfig
from l32jax.model.attention import Interval, Sight
from l32jax.model.cache import KeyValue
from l32jax.model.layers import (
    GeluMLP,
    LayerNorm,
    Projection,
    gate_param,
    lora_of,
    normal_param,
)
from l32jax.model.remat import Saved, remat
from l32jax.sharding import activation_spec

TOKEN_MULTIPLE = 8  # each tile is padded to a multiple of this many tokens


class VisionAttention(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        head_dim = config.embed_dim // config.num_heads
        sizes = {"d": config.embed_dim, "n": config.num_heads, "h": head_dim}
        lora = config.lora
        self.query = Projection(sizes, "d", "nh", lora=lora_of(lora, "query"), rngs=rngs)
        self.key = Projection(sizes, "d", "nh", lora=lora_of(lora, "key"), rngs=rngs)
        self.value = Projection(sizes, "d", "nh", lora=lora_of(lora, "value"), rngs=rngs)
        self.out = Projection(sizes, "nh", "d", lora=lora_of(lora, "out"), rngs=rngs)
        self.scale = head_dim**-0.5

    def __call__(self, x: Float[Array, "j t d"], sees: Sight) -> Float[Array, "j t d"]:
        kv = KeyValue.of(self.key(x), self.value(x))
        return self.out(sees.attend(self.query(x), kv, scale=self.scale))


class VisionBlock(nnx.Module):
    """A pre-norm transformer block; the global ones add their branches through gates."""

    def __init__(self, config: VisionConfig, *, gated: bool, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.embed_dim, config.norm_eps)
        self.attention = VisionAttention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.embed_dim, config.norm_eps)
        self.mlp = GeluMLP(config.embed_dim, config.mlp_dim, lora=config.lora, rngs=rngs)
        self.attention_gate = gate_param() if gated else None
        self.mlp_gate = gate_param() if gated else None

    def __call__(self, x: Float[Array, "j t d"], sees: Sight) -> Float[Array, "j t d"]:
        x = x + _gated(self.attention_gate, self.attention(self.attention_norm(x), sees))
        return x + _gated(self.mlp_gate, self.mlp(self.mlp_norm(x)))


def _gated(gate: nnx.Param | None, x: Array) -> Array:
    return x if gate is None else jnp.tanh(gate[...]).astype(x.dtype) * x


class TileEmbedding(nnx.Module):
    """A vector for each place in the grid of tiles, added through a gate."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        side, width = config.max_tiles, config.embed_dim
        self.embedding = normal_param(rngs, "cc_", (side, side, width), width**-0.5)
        self.gate = gate_param()

    def __call__(self, aspect: Int[Array, "j 2"]) -> Float[Array, "j c 1 d"]:
        return jnp.tanh(self.gate[...]) * _of_tiles(self.embedding[...], aspect)[:, :, None]


class PositionEmbedding(nnx.Module):
    """A vector for each token of a tile; the gate blends in one per token and place of the tile."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        side, tokens, width = config.max_tiles, config.tokens_per_tile, config.embed_dim
        scale = width**-0.5
        self.embedding = normal_param(rngs, "p_", (tokens, width), scale)
        self.tile_embedding = normal_param(rngs, "ccp_", (side, side, tokens, width), scale)
        self.gate = gate_param()

    def __call__(self, aspect: Int[Array, "j 2"]) -> Float[Array, "j c p d"]:
        gate = jnp.tanh(self.gate[...])
        return (1 - gate) * self.embedding[...] + gate * _of_tiles(self.tile_embedding[...], aspect)


def _of_tiles(table: Float[Array, "c c *rest"], aspect: Int[Array, "j 2"]) -> Array:
    """[j c *rest]: the table's entry for each tile of a grid of `aspect`; zeros past its last."""
    tile = jnp.arange(table.shape[0])
    height, width = aspect[:, :1], jnp.maximum(aspect[:, 1:], 1)
    used = jnp.expand_dims(tile < height * width, tuple(range(2, table.ndim)))
    rows = jnp.minimum(tile // width, table.shape[0] - 1)
    entries = table.at[rows, tile % width].get(out_sharding=_replicated_like(table, aspect))
    return jnp.where(used, entries, 0)


def _replicated_like(table: Array, aspect: Array) -> PartitionSpec:
    batch_axes = jax.typeof(aspect).sharding.spec[0]
    return PartitionSpec(batch_axes, *(None,) * (table.ndim - 1))


class VisionEncoder(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        vision = config.vision
        assert vision is not None
        width = vision.embed_dim
        self.patch_embedding = Projection(
            {"d": width, "e": 3 * vision.patch_size**2}, "e", "d", rngs=rngs
        )
        self.class_embedding = normal_param(rngs, "_", (width,), width**-0.5)
        self.pre_tile = TileEmbedding(vision, rngs=rngs)
        self.position = PositionEmbedding(vision, rngs=rngs)
        self.pre_norm = LayerNorm(width, vision.norm_eps)
        self.local_blocks = _stack(vision, vision.num_local_layers, gated=False, rngs=rngs)
        self.post_norm = LayerNorm(width, vision.norm_eps)
        self.post_tile = TileEmbedding(vision, rngs=rngs)
        self.global_blocks = _stack(vision, vision.num_global_layers, gated=True, rngs=rngs)
        self.config = vision
        self.tap_after_block = config.compat.vision_intermediates == "hf"

    def __call__(
        self,
        tiles: Float[Array, "j c 3 y x"],
        aspect: Int[Array, "j 2"],
        attention: AttentionConfig,
        saved: Saved = "everything",
    ) -> Float[Array, "j t e"]:
        """Features of every token: the final ones, then the taps, interleaved.

        Tokens are those of all `c` tiles in turn, then padding. Unused tiles are computed too, for
        they take part in attention, as in the reference.
        """
        assert jnp.issubdtype(tiles.dtype, jnp.floating), "pixels must be normalised first"
        num_tiles, num_tokens = tiles.shape[1], self.config.tokens_per_tile
        rows = activation_spec("j")
        x = self._embed(tiles, aspect)
        batch, width = x.shape[0], x.shape[-1]
        # Real tokens of all tiles first, padding last: then the reference's mask (pad tokens and
        # unused tiles see the used tiles, which see everything) is one interval of keys per row.
        padding = num_tiles * (-num_tokens % TOKEN_MULTIPLE)
        x = x.reshape(batch, num_tiles * num_tokens, width, out_sharding=rows)
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        sees = self._sees(aspect, num_tiles * num_tokens + padding, attention, x.dtype)

        x, taps = self._local(x, sees, saved)
        x = self.post_norm(x) + self._post_tile(aspect, padding).astype(x.dtype)
        x = _scan(self.global_blocks, x, sees, saved)

        taps = jnp.moveaxis(taps, 0, -1)  # channel c of tap j at c * num_taps + j, as in Meta
        taps = taps.reshape(batch, x.shape[1], -1, out_sharding=rows)
        return jnp.concatenate([x, taps], axis=-1)

    def _embed(self, tiles, aspect):
        batch, num_tiles = tiles.shape[:2]
        x = self.patch_embedding(patchify(tiles, self.config.patch_size))
        x = x.reshape(batch, num_tiles, -1, x.shape[-1], out_sharding=activation_spec("j"))
        x = x + self.pre_tile(aspect).astype(x.dtype)
        cls = jnp.zeros_like(x[:, :, :1]) + self.class_embedding[...].astype(x.dtype)
        x = jnp.concatenate([cls, x], axis=2)
        return self.pre_norm(x + self.position(aspect).astype(x.dtype))

    def _sees(self, aspect, length, attention: AttentionConfig, dtype) -> Sight:
        used = jnp.maximum(aspect[:, :1] * aspect[:, 1:], 1) * self.config.tokens_per_tile
        stop = jnp.where(jnp.arange(length) < used, length, used)
        heads, width = self.config.num_heads, self.config.embed_dim
        one = ("jsnh", (len(aspect), length, heads, width // heads))
        return Sight.of(
            Interval(jnp.zeros_like(stop), stop), attention, queries=one, keys=one, dtype=dtype
        )

    def _local(self, x, sees, saved):
        """One scan: every layer writes to the slot of the next tap, where that tap writes last."""
        run_block = remat(lambda x, block: block(x, sees), saved)
        slots = np.searchsorted(self.config.taps, np.arange(self.config.num_local_layers))
        after = self.tap_after_block

        def run(carry, block_and_slot):
            x, taps = carry
            block, slot = block_and_slot
            y = run_block(x, block)
            return (y, taps.at[slot].set(y if after else x)), None

        taps = jnp.zeros((len(self.config.taps) + 1, *x.shape), x.dtype, out_sharding=_slots_of(x))
        (x, taps), _ = jax.lax.scan(run, (x, taps), (self.local_blocks, slots))
        return x, taps[:-1]

    def _post_tile(self, aspect, padding):
        """[j t d]: in the order of the tokens, the padding's own at the end."""
        tile = self.post_tile(aspect)[:, :, 0]
        real = jnp.repeat(tile, self.config.tokens_per_tile, axis=1)
        return jnp.concatenate([real, jnp.repeat(tile, padding // tile.shape[1], axis=1)], axis=1)


def normalise(
    tiles: UInt8[Array, "*b c 3 y x"], aspect: Int[Array, "*b 2"], dtype: Any
) -> Float[Array, "*b c 3 y x"]:
    """Pixels as CLIP normalises them, in float32; tiles past the grid are zeros *after* that."""
    mean, std = (jnp.array(each, jnp.float32)[:, None, None] for each in (CLIP_MEAN, CLIP_STD))
    values = (tiles.astype(jnp.float32) / 255 - mean) / std
    used = jnp.arange(tiles.shape[-4]) < aspect.prod(axis=-1, keepdims=True)
    return jnp.where(used[..., None, None, None], values, 0).astype(dtype)


def patchify(tiles: Float[Array, "j c 3 y x"], size: int) -> Float[Array, "j t e"]:
    """Square patches, tile by tile in row-major order, each flattened as (channel, row, column)."""
    batch, num_tiles, channels, height, width = tiles.shape
    split = (batch, num_tiles, channels, height // size, size, width // size, size)
    rows = activation_spec("j")
    patches = tiles.reshape(split, out_sharding=rows).transpose(0, 1, 3, 5, 2, 4, 6)
    return patches.reshape(batch, -1, channels * size * size, out_sharding=rows)


def _stack(config: VisionConfig, num_layers: int, *, gated: bool, rngs: nnx.Rngs) -> VisionBlock:
    keys = jax.random.split(rngs.params(), num_layers)
    return jax.vmap(lambda key: VisionBlock(config, gated=gated, rngs=nnx.Rngs(key)))(keys)


def _slots_of(x: Float[Array, "j t d"]) -> PartitionSpec:
    return PartitionSpec(None, *jax.typeof(x).sharding.spec)


def _scan(blocks: VisionBlock, x: Array, sees: Sight, saved: Saved) -> Array:
    def run_block(x, block):
        return block(x, sees), None

    return jax.lax.scan(remat(run_block, saved), x, blocks)[0]
