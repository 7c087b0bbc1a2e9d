"""How many questions of easy-VQA a model answers exactly right."""

from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from l32jax.config import DataConfig, LlamaConfig
from l32jax.data.batches import place
from l32jax.data.samples import Sample, make_row, stack
from l32jax.data.sources import open_source, vision_shape
from l32jax.data.tokenizer import Tokenizer
from l32jax.model.llama import batch_logits, bind
from l32jax.model.parameters import Params

ROWS = 40  # pictures at a time


def accuracy(
    config: LlamaConfig, params: Params, tokenizer: Tokenizer, mesh: Mesh, *, blind: bool = False
) -> float:
    """Share of the 9,673 test questions whose greedy answer is the true one, word and end.

    A greedy answer is the true one exactly if every token of the truth scores highest after the
    ones before it. So one pass over questions with their answers decides, all of a picture's
    questions packed into one row, and nothing is generated.
    """
    source = open_source("easy-vqa/test", tokenizer, with_images=not blind)
    samples = [source[index] for index in range(len(source))]
    length = max(sum(len(d.tokens) for d in sample.documents) for sample in samples)
    data = DataConfig(mixture=(), batch_size=ROWS, length=length, max_images=0 if blind else 1)
    shape = vision_shape(data, config)
    right = []
    with jax.set_mesh(mesh):
        for first in range(0, len(samples), ROWS):
            part = samples[first : first + ROWS]
            filled = part + part[-1:] * (ROWS - len(part))
            batch = stack([make_row([sample], length=length, vision=shape) for sample in filled])
            hit = np.asarray(_hits(config, params, place(batch, mesh)))
            for sample, row in zip(part, hit | (batch["weights"] == 0), strict=False):
                right += _answered(sample, row)
    return float(np.mean(right))


def _answered(sample: Sample, hit: np.ndarray) -> list[bool]:
    ends = np.cumsum([len(document.tokens) for document in sample.documents])
    return [bool(part.all()) for part in np.split(hit[: ends[-1]], ends[:-1])]


@partial(jax.jit, static_argnums=0)
def _hits(config: LlamaConfig, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    return batch_logits(bind(config, params), batch).argmax(axis=-1) == batch["targets"]
