"""Floating-point operations of a training step, by arithmetic, and what a device could do.

Counted are matrix products and attention, two operations a multiply-add. Two counts of each:
`useful` is what the model asks for: real tokens, the pairs of tokens that see each other, text that
sees images, tiles that are used; of the image encoder each real image's whole canvas, for its
unused tiles take part in attention. `done` is what the devices are given: padding and empty slots
too. Nothing that is computed again in the backward pass is in either.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from l32jax.config import BlockKind, LlamaConfig, LoraConfig, Part, VisionConfig
from l32jax.objective_config import Objective, models_beside

TOKEN_MULTIPLE = 8  # `model.vision` pads the tokens of a tile to a multiple of this

# Dense bfloat16 FLOP/s of what JAX calls a device, by the beginning of its kind, longest match
# first. TPUs: the system architecture pages of Cloud TPU (docs.cloud.google.com/tpu/docs/v4, v5e,
# v5p, v6e, tpu7x), a chip each; of TPU7x, whose chip is two devices, half its 2307 TFLOP/s.
# GPUs: NVIDIA's data sheets, which give the double of it for sparse matrices where they say so.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None of a kind that is not known, like a CPU."""
    known = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(known, key=len)] if known else None


@dataclasses.dataclass(frozen=True)
class Counts:
    """What is in batches, and what they have room for; sums over rows.

    tokens, slots: real ones, and places for them. pairs: (token, token that it sees).
    looking: tokens that see an image. vision_pairs: (token, image token that it sees).
    images, image_slots: real ones, and places. tiles, tile_slots: used, and on the vision axis.
    """

    tokens: int = 0
    slots: int = 0
    pairs: int = 0
    looking: int = 0
    vision_pairs: int = 0
    images: int = 0
    image_slots: int = 0
    tiles: int = 0
    tile_slots: int = 0

    @classmethod
    def of(cls, batch: Mapping[str, np.ndarray], *, shares: int = 1) -> "Counts":
        """Those of a share of a batch, times the shares that have as much each."""
        seen = batch["stop"] - batch["start"]
        found = {"tokens": np.sum(seen > 0), "slots": seen.size, "pairs": seen.sum(dtype=np.int64)}
        if "aspect" in batch:
            tiles = batch["aspect"].prod(axis=-1)
            looked = batch["vision_stop"] - batch["vision_start"]
            found |= {
                "looking": np.sum(looked > 0),
                "vision_pairs": looked.sum(dtype=np.int64),
                "images": np.sum(tiles > 0),
                "image_slots": tiles.size,
                "tiles": tiles.sum(),
                "tile_slots": batch["tile_index"].size,
            }
        return cls(**{name: int(value) * shares for name, value in found.items()})

    def __add__(self, other: "Counts") -> "Counts":
        names = [field.name for field in dataclasses.fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def padding(self) -> dict[str, float]:
        """The shares of token, image and tile slots that are empty; of those that there are."""
        sides = {
            "text": (self.tokens, self.slots),
            "images": (self.images, self.image_slots),
            "tiles": (self.tiles, self.tile_slots),
        }
        return {side: 1 - used / room for side, (used, room) in sides.items() if room}


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations."""

    useful: int
    done: int

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.useful + other.useful, self.done + other.done)

    def __rmul__(self, factor: int) -> "Flops":
        return Flops(self.useful * factor, self.done * factor)


def step_flops(model: LlamaConfig, trains: Iterable[Part], counts: Counts) -> dict[Part, Flops]:
    """Of a forward and backward pass over what was counted, by the part that the weights are of.

    A product costs as much again for the gradient of its weights, if they train, and once more for
    that of its input, if anything before it trains: of a frozen encoder nothing, of a frozen
    language model between trained adapters everything.
    """
    trained = frozenset(trains)
    found: dict[Part, Flops] = {"language_model": _language_model(model, trained, counts)}
    if model.vision is not None:
        found["adapter"] = _adapter(model, trained, counts)
        found["vision_tower"] = _vision_tower(model.vision, trained, counts)
    if model.loras:
        found["lora"] = _lora(model, trained, counts)
    return found


def flops_beside(objective: Objective, model: LlamaConfig, counts: Counts) -> dict[str, Flops]:
    """Of the forward passes of an objective's teachers, and of its reference."""
    return {
        name: sum(
            (flops for other in others for flops in step_flops(other, (), counts).values()),
            Flops(0, 0),
        )
        for name, others in models_beside(objective, model).items()
    }


def lora_weights(model: LlamaConfig) -> dict[BlockKind | Literal["tower"], int]:
    """Numbers in the adapters, by the kind of block that they are in."""
    decoder, vision = model.decoder, model.vision
    heads, kv = (n * decoder.head_dim for n in (decoder.num_heads, decoder.num_kv_heads))
    one = _of_block(decoder.lora, decoder.embed_dim, heads, kv, decoder.mlp_dim, gated=True)
    found: dict[BlockKind | Literal["tower"], int] = {
        "self": decoder.count("self") * one,
        "cross": decoder.count("cross") * one,
    }
    if vision is not None:
        width, layers = vision.embed_dim, vision.num_local_layers + vision.num_global_layers
        one = _of_block(vision.lora, width, width, width, vision.mlp_dim, gated=False)
        found["tower"] = layers * one
    return found


def _of_block(
    lora: LoraConfig | None, width: int, heads: int, kv: int, mlp: int, *, gated: bool
) -> int:
    if lora is None:
        return 0
    sizes = {"query": heads, "key": kv, "value": kv, "out": heads, "up": mlp, "down": mlp}
    sizes |= {"gate": mlp} if gated else {}
    return lora.rank * sum(width + size for name, size in sizes.items() if name in lora.targets)


def _lora(model: LlamaConfig, trained: frozenset[Part], counts: Counts) -> Flops:
    """As products beside the others; keys and values of images count as if they were of text."""
    sizes, learns, flow = lora_weights(model), "lora" in trained, bool(trained)
    tokens = Flops(counts.tokens, counts.slots)
    found = _product(sizes["self"], tokens, weights=learns, inputs=flow)
    if model.vision is None or not counts.image_slots:
        return found
    looking = Flops(counts.looking, counts.slots)
    found += _product(sizes["cross"], looking, weights=learns, inputs=flow)
    tower = _tower_tokens(model.vision, counts)
    inside = reaches_tower(model.vision, trained)
    return found + _product(sizes["tower"], tower, weights=learns, inputs=inside)


def _product(size: int, times: Flops, *, weights: bool, inputs: bool) -> Flops:
    """Of a weight of so many numbers, met by so many tokens, with the gradients asked for."""
    return 2 * size * (1 + weights + inputs) * times


def _attention(width: int, pairs: Flops, *, queries: bool, keys: bool) -> Flops:
    """Two products forward; backward one for the weights' gradient, and one for each of q, k, v."""
    backward = (queries or keys) + queries + 2 * keys
    return 2 * width * (2 + backward) * pairs


def _language_model(model: LlamaConfig, trained: frozenset[Part], counts: Counts) -> Flops:
    decoder, learns = model.decoder, "language_model" in trained
    tokens = Flops(counts.tokens, counts.slots)
    flow = bool(trained)  # whatever trains, gradients reach every block: one scan runs them all
    heads, kv = (n * decoder.head_dim for n in (decoder.num_heads, decoder.num_kv_heads))
    block = decoder.embed_dim * (2 * heads + 2 * kv + 3 * decoder.mlp_dim)
    layers = decoder.count("self")
    attention = _attention(heads, Flops(counts.pairs, counts.pairs), queries=flow, keys=flow)
    return (
        layers * _product(block, tokens, weights=learns, inputs=flow)
        + layers * attention
        + _product(decoder.vocab_size * decoder.embed_dim, tokens, weights=learns, inputs=flow)
    )


def _adapter(model: LlamaConfig, trained: frozenset[Part], counts: Counts) -> Flops:
    """Projector and cross-attention; those of a text-only batch are not computed."""
    decoder, vision, learns = model.decoder, model.vision, "adapter" in trained
    assert vision is not None
    if not counts.image_slots:
        return Flops(0, 0)
    encoder = reaches_tower(vision, trained)
    lora = decoder.lora if "lora" in trained else None
    towards_images = learns or encoder
    keys = towards_images or (lora is not None and not {"key", "value"}.isdisjoint(lora.targets))
    flow = bool(trained)
    per_tile = vision.tokens_per_tile
    projected = Flops(counts.tiles * per_tile, counts.image_slots * vision.max_tiles * per_tile)
    image_tokens = Flops(counts.tiles * per_tile, counts.tile_slots * per_tile)
    text_tokens = Flops(counts.looking, counts.slots)
    heads, kv = (n * decoder.head_dim for n in (decoder.num_heads, decoder.num_kv_heads))
    width, layers = decoder.embed_dim, decoder.count("cross")
    pairs = Flops(counts.vision_pairs, counts.vision_pairs)
    return (
        _product(vision.feature_dim * width, projected, weights=learns, inputs=encoder)
        + layers * _product(2 * width * kv, image_tokens, weights=learns, inputs=towards_images)
        + layers
        * _product(
            width * (2 * heads + 3 * decoder.mlp_dim), text_tokens, weights=learns, inputs=flow
        )
        + layers * _attention(heads, pairs, queries=flow, keys=keys)
    )


def _vision_tower(vision: VisionConfig, trained: frozenset[Part], counts: Counts) -> Flops:
    """The whole canvas of every slot is encoded, whether an image is in it or not."""
    learns, flow = "vision_tower" in trained, reaches_tower(vision, trained)
    width = vision.embed_dim
    tokens = _tower_tokens(vision, counts)
    canvas, padded = _canvas(vision)
    pairs = Flops(counts.images * canvas**2, counts.image_slots * padded**2)
    patches = vision.max_tiles * vision.grid**2 * Flops(counts.images, counts.image_slots)
    block = 4 * width**2 + 2 * width * vision.mlp_dim
    layers = vision.num_local_layers + vision.num_global_layers
    return (
        _product(3 * vision.patch_size**2 * width, patches, weights=learns, inputs=False)
        + layers * _product(block, tokens, weights=learns, inputs=flow)
        + layers * _attention(width, pairs, queries=flow, keys=flow)
    )


def reaches_tower(vision: VisionConfig, trained: frozenset[Part]) -> bool:
    """Whether gradients go into the encoder."""
    return "vision_tower" in trained or ("lora" in trained and vision.lora is not None)


def _canvas(vision: VisionConfig) -> tuple[int, int]:
    """Tokens of an image's tiles, used or not; and with those that fill them up."""
    canvas = vision.max_tiles * vision.tokens_per_tile
    return canvas, canvas + vision.max_tiles * (-vision.tokens_per_tile % TOKEN_MULTIPLE)


def _tower_tokens(vision: VisionConfig, counts: Counts) -> Flops:
    canvas, padded = _canvas(vision)
    return Flops(counts.images * canvas, counts.image_slots * padded)
