"""The whole model as functions of (config, parameters, arrays): the one door to Flax."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from l32jax.config import AttentionConfig, LlamaConfig
from l32jax.model.attention import Interval
from l32jax.model.cache import Cache
from l32jax.model.decoder import Decoder
from l32jax.model.layers import Projection
from l32jax.model.parameters import Params, flatten
from l32jax.model.remat import Saved
from l32jax.model.spread import by_image, by_row
from l32jax.model.tile_list import Tiles, end_to_end
from l32jax.model.vision import VisionEncoder, normalise
from l32jax.sharding import CONTEXT_AXIS, activation_spec, single_device_mesh

Batch = dict[str, Array]
AUTO = AttentionConfig()


class Images(NamedTuple):
    """The images of a batch; empty slots have aspect (0, 0).

    tiles: pixels, or floats that are normalised already and zero where there is no tile; None where
      a frozen encoder has computed the features of the listed tiles before.
    tile_index lists the tiles on the axis that text attends to, as image * c + tile of the row:
    used tiles first, image by image.
    """

    tiles: UInt8[Array, "b i c 3 y x"] | Float[Array, "b i c 3 y x"] | None
    aspect: Int[Array, "b i 2"]
    tile_index: Int[Array, "b m"]
    features: Float[Array, "b s e"] | None = None

    @classmethod
    def of(cls, batch: Batch) -> "Images | None":
        """Those of a batch (its layout: `data.rows.FIELDS`)."""
        if "aspect" not in batch:
            return None
        tiles, features = batch.get("tiles"), batch.get("features")
        return cls(tiles, batch["aspect"], batch["tile_index"], features)

    def normalised(self, dtype: Any) -> "Images":
        """With tiles as the encoder takes them, or features of that dtype."""
        if self.features is not None:
            return self._replace(features=self.features.astype(dtype))
        assert self.tiles is not None
        if self.tiles.dtype == jnp.uint8:
            return self._replace(tiles=normalise(self.tiles, self.aspect, dtype))
        return self._replace(tiles=self.tiles.astype(dtype))


class Llama(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.decoder = Decoder(config, rngs=rngs)
        if config.vision is not None:
            self.vision = VisionEncoder(config, rngs=rngs)
            sizes = {"e": config.vision.feature_dim, "d": config.decoder.embed_dim}
            self.projector = Projection(sizes, "e", "d", bias=True, rngs=rngs)

    def features(
        self,
        images: Images,
        attention: AttentionConfig = AUTO,
    ) -> Float[Array, "b i c p e"]:
        vision = self.vision.config
        tokens = by_row(self._encoded(images, attention), images.aspect.shape)
        tokens = tokens[:, :, : vision.max_tiles * vision.tokens_per_tile]
        tiled = (*tokens.shape[:2], vision.max_tiles, vision.tokens_per_tile, tokens.shape[-1])
        return tokens.reshape(tiled, out_sharding=activation_spec("b"))

    def _encoded(
        self, images: Images, attention: AttentionConfig, saved: Saved = "everything"
    ) -> Float[Array, "j t e"]:
        assert images.tiles is not None, "their features are given"
        return self.vision(by_image(images.tiles), by_image(images.aspect), attention, saved)

    def project(self, features: Float[Array, "b *tiles t e"]) -> Float[Array, "b *tiles t d"]:
        first, *_, width = features.shape
        where = PartitionSpec(*jax.typeof(features).sharding.spec[:2])
        flat = self.projector(features.reshape(first, -1, width, out_sharding=where))
        return flat.reshape(*features.shape[:-1], -1, out_sharding=where)

    def vision_tokens(
        self,
        images: Images,
        attention: AttentionConfig = AUTO,
        saved: Saved = "everything",
    ) -> Float[Array, "b s d"]:
        """The projected tokens of the listed tiles, end to end.

        Devices along the context axis share the tiles, if they divide them and are asked to.
        """
        shares = jax.sharding.get_abstract_mesh().shape[CONTEXT_AXIS]
        shared = attention.vision_keys == "shared" and images.tile_index.shape[1] % shares == 0
        where = activation_spec("bt" if shared else "b")
        if images.features is not None:
            return self.project(jax.sharding.reshard(images.features, where))
        vision = self.vision.config
        tokens = self.project(self._encoded(images, attention, saved))
        tokens = by_row(tokens, images.aspect.shape)
        tiles = Tiles(vision.max_tiles, vision.tokens_per_tile)
        return end_to_end(tokens, images.tile_index, tiles, where)


@functools.lru_cache(maxsize=32)
def definition(config: LlamaConfig) -> nnx.GraphDef:
    """The architecture without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))


def bind(config: LlamaConfig, params: Params) -> Llama:
    """The model with its arrays; use it inside jit."""
    return nnx.merge(definition(config), params)


def init_params(config: LlamaConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters as a plain nested dict; under a mesh, each is born on its devices."""
    params = nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(key))))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def abstract_params(config: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes, dtypes and shardings of `init_params`, without allocating anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path."""
    with jax.set_mesh(single_device_mesh()):
        return {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}


class Output(NamedTuple):
    states: Float[Array, "b t d"]
    cache: Cache | None


def forward(
    model: Llama,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    text: Interval,
    *,
    seen_images: Interval | None = None,
    images: Images | None = None,
    cache: Cache | None = None,
    write_at: Int[Array, "b"] | None = None,
    saved: Saved = "everything",
    attention: AttentionConfig = AUTO,
    dtype: Any = None,
) -> Output:
    """Tokens to final states, for training, prefill and decoding alike.

    Args:
      positions: rotary position of each token in its document.
      text: the key slots each token sees, of this row or, with a cache, of the cache.
      seen_images: the image tokens that each text token sees; None for a text-only call.
      images: encoded here; None while decoding, when their keys and values are in the cache.
      write_at: the cache slot of each row's first new token.
      dtype: of activations; by default that of the parameters.

    Under a mesh with a context axis, rows are in the order of `kernels.context.balanced_order`,
    as `data.batches.place` lays them out, and so are the states.
    """
    tokens, positions, text, seen_images = _placed((tokens, positions, text, seen_images), "bt")
    images, write_at = _placed((images, write_at), "b")
    decoder = model.decoder
    dtype = jnp.dtype(dtype or decoder.embedding.weight[...].dtype)
    vision = None
    if images is not None:
        vision = model.vision_tokens(images.normalised(dtype), attention, saved)
    context = decoder.context(
        positions,
        text,
        seen_images,
        vision=vision,
        cache=cache,
        write_at=write_at,
        attention=attention,
        dtype=dtype,
    )
    return Output(*decoder(decoder.embed(tokens, dtype), context, cache, saved=saved))


def text_seen(batch: Batch) -> Interval:
    return Interval(batch["start"], batch["stop"])


def images_seen(batch: Batch) -> Interval | None:
    if "vision_start" not in batch:
        return None
    return Interval(batch["vision_start"], batch["vision_stop"])


def batch_logits(model: Llama, batch: Batch, **options: Any) -> Float[Array, "b t v"]:
    """Float32 scores of the next token at every place of packed rows."""
    return model.decoder.logits(forward_batch(model, batch, **options).states)


def forward_batch(model: Llama, batch: Batch, **options: Any) -> Output:
    """`forward` over whole rows with their images; `options` are its further arguments."""
    return forward(
        model,
        batch["tokens"],
        batch["positions"],
        text_seen(batch),
        seen_images=images_seen(batch),
        images=Images.of(batch),
        **options,
    )


def _placed(arrays: Any, dims: str) -> Any:
    """Arrays in their place on the mesh, wherever the caller had them."""
    spec = activation_spec(dims)
    return jax.tree.map(lambda array: jax.sharding.reshard(array, spec), arrays)
