"""Looking inside: what the forward pass computes and does not return."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l32jax.config import AttentionConfig
from l32jax.model.attention import Interval
from l32jax.model.decoder import Context, CrossBlock, whole
from l32jax.model.llama import AUTO, Batch, Images, Llama, images_seen, text_seen
from l32jax.sharding import activation_spec

QUERIES_AT_ONCE = 8  # of a row: [b n 8 s] is what is held of the attention of a layer


class Looks(NamedTuple):
    """What cross-attention does, by cross layer from the first to the last, in float32.

    Means over heads and over the tokens asked about that see an image; NaN where none does.

    attention_gate, mlp_gate: the factor of each branch, tanh applied.
    residual_share: how long what attention adds is, beside the stream that it is added to.
    class_share: of the weight, what is on the class tokens of tiles.
    token_spread: entropy of the weights over that of equal ones: 0 for one token, 1 for all alike.
    tile_spread: the same of the weight of whole tiles, over the tokens that see several.
    """

    attention_gate: Float[Array, "l"]
    mlp_gate: Float[Array, "l"]
    residual_share: Float[Array, "l"]
    class_share: Float[Array, "l"]
    token_spread: Float[Array, "l"]
    tile_spread: Float[Array, "l"]


def look(
    model: Llama,
    batch: Batch,
    places: Int[Array, "b q"],
    *,
    attention: AttentionConfig = AUTO,
    dtype: Any = None,
) -> tuple[Looks, Float[Array, "b t d"]]:
    """How each cross layer uses the images, by some tokens of each row, and the final states.

    Costs a forward pass, and room for QUERIES_AT_ONCE of the tokens. `places` are positions in the
    stored row; negative ones are not asked about.
    """
    x, context = _beginning(model, batch, attention, dtype)
    decoder, vision = model.decoder, model.vision.config

    def run_group(x, group_and_layer):
        group, layer = group_and_layer
        looks = []
        for block in group.blocks:
            if isinstance(block, CrossBlock):
                looks.append(_look(block, x, context, places, vision.tokens_per_tile))
            x, _ = block(x, context, None, layer)
        return x, jax.tree.map(lambda *values: jnp.stack(values), *looks)

    layers = jnp.arange(decoder.config.decoder.num_groups)
    x, looks = jax.lax.scan(run_group, x, (decoder.groups, layers))
    return jax.tree.map(lambda values: values.reshape(-1), looks), whole(decoder.final_norm(x))


def likeliest(
    model: Llama, states: Float[Array, "b t d"], places: Int[Array, "b q"]
) -> Int[Array, "b q"]:
    """The token that scores highest after each of these places of a row."""
    scores = model.decoder.logits(_take(states, places))
    return scores.argmax(axis=-1).astype(jnp.int32)


def cross_attention_weights(model: Llama, batch: Batch) -> Float[Array, "l b n t s"]:
    """How much each text token attends to each image token, by cross layer and head.

    Rows sum to one, or to zero where a token sees no image. Every weight is materialised: for
    looking at a few pictures.
    """
    decoder = model.decoder
    x, context = _beginning(model, batch, AUTO, None)
    assert context.images is not None
    found = []
    for index in range(decoder.config.decoder.num_groups):
        group = jax.tree.map(lambda weight, index=index: weight[index], decoder.groups)
        for block in group.blocks:
            if isinstance(block, CrossBlock):
                q, k, _ = _heads(block, x, context)
                found.append(_weights(block, q, k, context.images.interval))
            x, _ = block(x, context, None, jnp.int32(index))
    return jnp.stack(found)


def _beginning(
    model: Llama, batch: Batch, attention: AttentionConfig, dtype: Any
) -> tuple[Float[Array, "b t d"], Context]:
    """What the first block is given, of a batch with images."""
    images = Images.of(batch)
    assert images is not None
    decoder = model.decoder
    dtype = jnp.dtype(dtype or decoder.embedding.weight[...].dtype)
    context = decoder.context(
        batch["positions"],
        text_seen(batch),
        images_seen(batch),
        vision=model.vision_tokens(images.normalised(dtype), attention),
        attention=attention,
        dtype=dtype,
    )
    x = jax.sharding.reshard(decoder.embed(batch["tokens"], dtype), context.stream)
    return x, context


def _look(
    block: CrossBlock,
    x: Float[Array, "b t d"],
    context: Context,
    places: Int[Array, "b q"],
    tokens_per_tile: int,
) -> Looks:
    """Of one layer: scalars."""
    assert context.images is not None
    rows = _take(x, places)
    interval = Interval(*(_take(bound, places) for bound in context.images.interval))
    q, k, v = _heads(block, rows, context)
    gate = jnp.tanh(block.attention_gate[...])

    def some(queries):
        q, rows, *bounds = queries
        weights = _weights(block, q, k, Interval(*bounds))
        seen = jnp.einsum("bnts,bnsh->btnh", weights.astype(v.dtype), v)
        added = gate * block.attention.out(seen)
        return _length(added) / _length(rows), *_spreads(
            weights, Interval(*bounds), tokens_per_tile
        )

    parts = jax.lax.map(some, tuple(_chunks(array) for array in (q, rows, *interval)))
    share, on_class, tokens, tiles = (_unchunked(part) for part in parts)
    num_seen = interval.stop - interval.start
    asked = (places >= 0) & (num_seen > 0)
    return Looks(
        gate,
        jnp.tanh(block.mlp_gate[...]),
        _mean(share, asked),
        _mean(on_class, asked),
        _mean(tokens, asked),
        _mean(tiles, asked & (num_seen > tokens_per_tile)),
    )


def _spreads(
    weights: Float[Array, "b n t s"], interval: Interval, tokens_per_tile: int
) -> tuple[Float[Array, "b t"], Float[Array, "b t"], Float[Array, "b t"]]:
    """The share on class tokens, and the spreads over tokens and tiles."""
    by_tile = weights.reshape(
        *weights.shape[:3], -1, tokens_per_tile, out_sharding=activation_spec("bn")
    )
    num_seen = interval.stop - interval.start
    on_class = by_tile[..., 0].sum(-1).mean(1)
    over_tiles = _spread(by_tile.sum(-1), num_seen // tokens_per_tile)
    return on_class, _spread(weights, num_seen), over_tiles


def _spread(
    weights: Float[Array, "b n t parts"], num_seen: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    entropy = jax.scipy.special.entr(weights).sum(-1).mean(1)
    return entropy / jnp.log(jnp.maximum(num_seen, 2))


def _mean(values: Float[Array, "b q"], where: Array) -> Float[Array, ""]:
    return jnp.where(where, values, 0).sum() / where.sum()


def _length(x: Float[Array, "b t d"]) -> Float[Array, "b t"]:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def _chunks(x: Float[Array, "b q *rest"] | Int[Array, "b q"]) -> Array:
    """[chunks b t *rest]"""
    size = min(QUERIES_AT_ONCE, x.shape[1])
    assert x.shape[1] % size == 0, x.shape
    return jnp.stack(jnp.split(x, x.shape[1] // size, axis=1))


def _unchunked(x: Float[Array, "chunks b t"]) -> Float[Array, "b q"]:
    return jnp.concatenate(list(x), axis=1)


def _take(x: Array, places: Int[Array, "b q"]) -> Array:
    """[b q *rest] of [b t *rest], on every device of a row."""
    rows = jnp.arange(x.shape[0])[:, None]
    return x.at[rows, jnp.maximum(places, 0)].get(out_sharding=activation_spec("b"))


def _heads(
    block: CrossBlock, x: Float[Array, "b t d"], context: Context
) -> tuple[Float[Array, "b t n h"], Float[Array, "b n s h"], Float[Array, "b n s h"]]:
    """Queries of x, and the images' keys and values for each of them."""
    attention = block.attention
    assert context.vision is not None
    q = attention.query_norm(attention.query(whole(block.attention_norm(x))))
    vision = jax.sharding.reshard(context.vision, activation_spec("bsd"))
    key, value = attention.keys_and_values(vision)
    shared = q.shape[2] // key.shape[1]
    spec = activation_spec("bnsh")
    key, value = (jnp.repeat(each, shared, axis=1, out_sharding=spec) for each in (key, value))
    return q, key, value


def _weights(
    block: CrossBlock, q: Float[Array, "b t n h"], k: Float[Array, "b n s h"], sees: Interval
) -> Float[Array, "b n t s"]:
    scores = jnp.einsum("btnh,bnsh->bnts", q, k).astype(jnp.float32) * block.attention.scale
    key = jnp.arange(k.shape[2])
    visible = (key >= sees.start[..., None]) & (key < sees.stop[..., None])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.where(visible[:, None], weights, 0)
