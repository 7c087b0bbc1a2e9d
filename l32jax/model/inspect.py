"""Looking inside: what the forward pass computes and does not return."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from l32jax.model.decoder import Context, CrossBlock
from l32jax.model.llama import AUTO, Batch, Images, Llama, images_seen, text_seen
from l32jax.sharding import activation_spec


def cross_attention_weights(model: Llama, batch: Batch) -> Float[Array, "l b n t s"]:
    """How much each text token attends to each image token, by cross layer and head.

    Rows sum to one, or to zero where a token sees no image. Every weight is materialised: for
    looking at a few pictures.
    """
    images = Images.of(batch)
    assert images is not None
    decoder = model.decoder
    x = decoder.embed(batch["tokens"], decoder.embedding.weight[...].dtype)
    context = decoder.context(
        batch["positions"],
        text_seen(batch),
        images_seen(batch),
        vision=model.vision_tokens(images._replace(tiles=images.tiles.astype(x.dtype))),
        attention=AUTO,
        dtype=x.dtype,
    )
    found = []
    for index in range(decoder.config.decoder.num_groups):
        group = jax.tree.map(lambda weight, index=index: weight[index], decoder.groups)
        for block in group.blocks:
            if isinstance(block, CrossBlock):
                found.append(_weights(block, x, context))
            x, _ = block(x, context, None, jnp.int32(index))
    return jnp.stack(found)


def _weights(
    block: CrossBlock, x: Float[Array, "b t d"], context: Context
) -> Float[Array, "b n t s"]:
    attention = block.attention
    assert context.vision is not None and context.images is not None
    start, stop = context.images.interval
    q = attention.query_norm(attention.query(block.attention_norm(x)))
    k = attention.keys_and_values(context.vision).key
    shared = q.shape[2] // k.shape[1]
    k = jnp.repeat(k, shared, axis=1, out_sharding=activation_spec("bnsh"))
    scores = jnp.einsum("btnh,bnsh->bnts", q, k).astype(jnp.float32) * attention.scale
    key = jnp.arange(k.shape[2])
    visible = (key >= start[..., None]) & (key < stop[..., None])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.where(visible[:, None], weights, 0)
