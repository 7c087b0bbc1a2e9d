"""Tiny models with nothing zero or one by chance, and batches to calibrate them on."""

import dataclasses
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from l32jax.config import LlamaConfig
from l32jax.data.batches import place
from l32jax.data.rows import Batch, VisionShape, make_row, stack
from l32jax.data.samples import Sample
from l32jax.model.llama import batch_logits, bind
from l32jax.presets import TINY_TEXT, TINY_VISION

LENGTH = 32
TEXT = LlamaConfig(
    decoder=dataclasses.replace(
        TINY_TEXT.decoder, num_groups=3, num_heads=4, num_kv_heads=2, mlp_dim=96
    )
)
assert TINY_VISION.vision is not None
VISION = LlamaConfig(
    decoder=dataclasses.replace(
        TEXT.decoder, num_groups=2, group_pattern=("self", "cross"), tied_embedding=False
    ),
    vision=dataclasses.replace(TINY_VISION.vision, num_local_layers=2, taps=(1,)),
)
MODELS = {"text": TEXT, "vision": VISION}


def rows(config: LlamaConfig, count: int = 8) -> Batch:
    """Two documents in each row, and of a vision model one or two pictures before one of them."""
    random = np.random.default_rng(0)
    vision = None
    if config.vision is not None:
        vision = VisionShape.of(config, max_images=2, max_tiles=4)

    def sample(size: int, pictures: list[np.ndarray]) -> Sample:
        words = random.integers(0, 256, size).tolist()
        tokens = [words[0], *[config.decoder.vocab_size] * len(pictures), *words[1:]]
        return Sample.single(tokens, [1.0] * len(tokens), pictures)

    def row(index: int) -> Batch:
        pictures = [random.integers(0, 256, (28 * side, 28, 3), np.uint8) for side in (1, 2)]
        pictures = pictures[: index % 3] if vision else []
        samples = [sample(12, pictures), sample(14, [])]
        return make_row(samples, length=LENGTH, vision=vision)

    return stack([row(index) for index in range(count)])


def batches(config: LlamaConfig, mesh: Mesh) -> list[dict[str, jax.Array]]:
    """Two of eight rows each, on the mesh that is set."""
    both = rows(config, 16)
    return [
        place({name: array[part::2] for name, array in both.items()}, mesh) for part in range(2)
    ]


@partial(jax.jit, static_argnums=0)
def logits(config: LlamaConfig, params, batch) -> jax.Array:
    return batch_logits(bind(config, params), batch)
