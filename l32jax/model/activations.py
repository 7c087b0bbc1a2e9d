"""What flows through the blocks, summed over tokens: what pruning judges and mends by."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from l32jax.model.cache import KeyValue
from l32jax.model.decoder import Context, CrossBlock, SelfBlock, whole
from l32jax.model.layers import RMSNorm
from l32jax.model.llama import AUTO, Batch, Images, Llama, images_seen, text_seen
from l32jax.model.rope import rotate
from l32jax.sharding import stream_spec

# Where products take their inputs, in each block: what normalises the stream gives, before its
# scale; what heads read; what neurons of the MLP are.
Place = Literal["attention_norm", "heads", "mlp_norm", "neurons"]


class Sum(NamedTuple):
    """Of weighted tokens; `weight` is that of all of them."""

    value: Array
    weight: Float[Array, "*l"]


class BlockSums(NamedTuple):
    """Squares of the inputs at each `Place`, and of what cross-attention's norms give."""

    attention_norm: Sum
    heads: Sum
    mlp_norm: Sum
    neurons: Sum
    query_norm: Sum | None
    key_norm: Sum | None


class Sums(NamedTuple):
    """Of a batch, in float32, by layer group.

    influence: of groups, 1 - cos(stream before, stream after) (ShortGPT, arXiv 2403.03853).
    blocks: one for each slot of the group pattern.
    final_norm: squares of what the last norm gives, before its scale; [d].
    vision: squares of the projected image tokens that some text sees; [d].
    """

    influence: Sum
    blocks: tuple[BlockSums, ...]
    final_norm: Sum
    vision: Sum | None


class Inside(NamedTuple):
    """Of one block; the weights say which tokens count."""

    attention_norm: Float[Array, "b t d"]
    heads: Float[Array, "b t n h"]
    mlp_norm: Float[Array, "b t d"]
    neurons: Float[Array, "b t f"]
    weight: Float[Array, "b t"]
    query_norm: Float[Array, "b t n h"] | None = None
    key_norm: Float[Array, "b s k h"] | None = None
    key_weight: Float[Array, "b s"] | None = None


class Stream(NamedTuple):
    """What the blocks of a group are given: the stream, and the image tokens beside it."""

    x: Float[Array, "b t d"]
    vision: Float[Array, "b s d"] | None


def observe(model: Llama, batch: Batch) -> Sums:
    """Costs a forward pass. Padding does not count, nor what sees no image in cross blocks."""
    stream = begin(model, batch)
    context, weight = _context(model, batch, stream), _is_text(batch)

    def run_group(x, group):
        before, sums = x, []
        for block in group.blocks:
            x, inside = _through(block, x, context, weight)
            sums.append(_squares_inside(inside))
        return x, (_change(before, x, weight), tuple(sums))

    x, (influence, blocks) = jax.lax.scan(run_group, stream.x, model.decoder.groups)
    last = _squares(_normalised(model.decoder.final_norm, x), weight)
    seen = None if stream.vision is None else _squares(stream.vision, _seen_keys(context))
    return Sums(influence, blocks, last, seen)


def begin(model: Llama, batch: Batch) -> Stream:
    """What the first group is given."""
    decoder, images, vision = model.decoder, Images.of(batch), None
    dtype = jnp.dtype(decoder.embedding.weight[...].dtype)
    if images is not None:
        vision = model.vision_tokens(images.normalised(dtype))
    x = decoder.embed(batch["tokens"], dtype)
    return Stream(jax.sharding.reshard(x, stream_spec(x.shape[1])), vision)


def products(
    model: Llama, batch: Batch, stream: Stream, group: Int[Array, ""], place: Place
) -> tuple[Stream, tuple[Sum, ...]]:
    """Runs one group; by slot, the sums of products [a a] of each two inputs at the place.

    [n h] are one dimension there. Every device holds the whole of a sum.
    """
    context, weight = _context(model, batch, stream), _is_text(batch)
    x, sums = stream.x, []
    for block in jax.tree.map(lambda weights: weights[group], model.decoder.groups).blocks:
        x, inside = _through(block, x, context, weight)
        sums.append(_products(getattr(inside, place), inside.weight))
    return stream._replace(x=x), tuple(sums)


def _context(model: Llama, batch: Batch, stream: Stream) -> Context:
    return model.decoder.context(
        batch["positions"],
        text_seen(batch),
        images_seen(batch),
        vision=stream.vision,
        attention=AUTO,
        dtype=stream.x.dtype,
    )


def _is_text(batch: Batch) -> Float[Array, "b t"]:
    return (batch["stop"] > batch["start"]).astype(jnp.float32)


def _seen_keys(context: Context) -> Float[Array, "b s"]:
    """Images' tiles lie end to end: those that no text sees are padding behind them."""
    assert context.images is not None and context.vision is not None
    stop = context.images.interval.stop.max(axis=1)
    return (jnp.arange(context.vision.shape[1]) < stop[:, None]).astype(jnp.float32)


def _through(
    block: SelfBlock | CrossBlock,
    x: Float[Array, "b t d"],
    context: Context,
    weight: Float[Array, "b t"],
) -> tuple[Float[Array, "b t d"], Inside]:
    """What the block gives (as `decoder` has it), and what it is made of."""
    y = whole(block.attention_norm(x))
    if isinstance(block, CrossBlock):
        heads, more = _attend_to_images(block, y, context)
        assert context.sees_image is not None
        weight = weight * jax.sharding.reshard(context.sees_image, jax.typeof(weight).sharding)
        attention_gate, mlp_gate = (
            jnp.tanh(gate[...]).astype(x.dtype) for gate in (block.attention_gate, block.mlp_gate)
        )
        mlp_gate = mlp_gate * context.sees_image[..., None]
    else:
        heads, more = _attend_to_text(block, y, context), {}
        attention_gate = mlp_gate = jnp.ones((), x.dtype)
    middle = x + attention_gate * block.attention.out(heads, context.stream)
    z = whole(block.mlp_norm(middle))
    neurons = jax.nn.silu(block.mlp.gate(z)) * block.mlp.up(z)
    after = middle + mlp_gate * block.mlp.down(neurons, context.stream)
    inside = Inside(
        _normalised(block.attention_norm, x),
        heads,
        _normalised(block.mlp_norm, middle),
        neurons,
        weight,
        **more,
    )
    return after, inside


def _attend_to_text(
    block: SelfBlock, y: Float[Array, "b t d"], context: Context
) -> Float[Array, "b t n h"]:
    attention = block.attention
    key, value = rotate(attention.key(y), *context.rotation), attention.value(y)
    q = rotate(attention.query(y), *context.rotation)
    return context.text.attend(q, KeyValue.of(key, value), scale=attention.scale)


def _attend_to_images(
    block: CrossBlock, y: Float[Array, "b t d"], context: Context
) -> tuple[Float[Array, "b t n h"], dict[str, Array]]:
    attention = block.attention
    assert context.images is not None and context.vision is not None
    query, key = attention.query(y), attention.key(context.vision)
    kv = KeyValue.of(attention.key_norm(key), attention.value(context.vision))
    heads = context.images.attend(attention.query_norm(query), kv, scale=attention.scale)
    return heads, {
        "query_norm": _normalised(attention.query_norm, query),
        "key_norm": _normalised(attention.key_norm, key),
        "key_weight": _seen_keys(context),
    }


def _normalised(norm: RMSNorm, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
    """In float32, before the scale."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + norm.eps)


def _squares_inside(inside: Inside) -> BlockSums:
    """Of query and key norms, heads are tokens as well: all of them share one scale."""
    query = key = None
    if inside.query_norm is not None:
        assert inside.key_norm is not None and inside.key_weight is not None
        query = _mean_of_heads(_squares(inside.query_norm, inside.weight))
        key = _mean_of_heads(_squares(inside.key_norm, inside.key_weight))
    places = {place: _squares(getattr(inside, place), inside.weight) for place in get_args(Place)}
    return BlockSums(**places, query_norm=query, key_norm=key)


def _mean_of_heads(squares: Sum) -> Sum:
    return squares._replace(value=squares.value.mean(axis=0))


def _squares(x: Float[Array, "b t *rest"], weight: Float[Array, "b t"]) -> Sum:
    weight = _beside(weight, x)
    expanded = jnp.expand_dims(weight, tuple(range(2, x.ndim)))
    total = jnp.sum(x.astype(jnp.float32) ** 2 * expanded, axis=(0, 1))
    return Sum(jax.sharding.reshard(total, PartitionSpec()), weight.sum())


def _change(
    before: Float[Array, "b t d"], after: Float[Array, "b t d"], weight: Float[Array, "b t"]
) -> Sum:
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    lengths = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    cosine = jnp.sum(before * after, axis=-1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)
    weight = _beside(weight, before)
    return Sum(jnp.sum((1 - cosine) * weight), weight.sum())


def _products(x: Float[Array, "b t *a"], weight: Float[Array, "b t"]) -> Sum:
    rows = PartitionSpec(*jax.typeof(x).sharding.spec[:2])
    x = x.reshape(*x.shape[:2], -1, out_sharding=rows).astype(jnp.float32)
    weight = _beside(weight, x)
    total = jnp.einsum("bta,btc->ac", x * weight[..., None], x, out_sharding=PartitionSpec())
    return Sum(total, weight.sum())


def _beside(weight: Float[Array, "b t"], x: Array) -> Float[Array, "b t"]:
    return jax.sharding.reshard(weight, PartitionSpec(*jax.typeof(x).sharding.spec[:2]))
