"""A packed row is its documents, each as it is alone: logits and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.data.batches import place
from l32jax.data.rows import VisionShape, make_row, stack
from l32jax.data.samples import Document, Sample
from l32jax.model.llama import batch_logits, bind
from l32jax.model.parameters import flatten
from l32jax.sharding import single_device_mesh
from tests import golden

CONFIG = golden.VISION
IMAGE_ID = CONFIG.decoder.vocab_size
LENGTH = 48
VISION = VisionShape.of(CONFIG, max_images=4, max_tiles=4, slots=10)
RNG = np.random.default_rng(0)


def words(count: int) -> list[int]:
    return RNG.integers(0, IMAGE_ID, count).tolist()


def picture(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def document(tokens, images=()) -> Document:
    """Weights of their own for all targets, some of them zero."""
    weights = np.where(RNG.random(len(tokens)) < 0.3, 0, RNG.random(len(tokens)))
    return Document(tokens, weights.tolist(), images)


def sample(tokens, pictures=()) -> Sample:
    return Sample((document(tokens, tuple(range(len(pictures)))),), tuple(pictures))


# Text alone, an image in the middle, two at once and text between, two documents over one image.
SAMPLES = [
    sample(words(7)),
    sample([*words(2), IMAGE_ID, *words(4)], [picture(56, 112)]),
    sample([IMAGE_ID, IMAGE_ID, *words(5)], [picture(50, 50), picture(100, 40)]),
    Sample(
        (document([IMAGE_ID, *words(6)], (0,)), document([*words(3), IMAGE_ID, *words(5)], (0,))),
        (picture(70, 90),),
    ),
    sample(words(3)),
]
EMPTY = make_row([], length=LENGTH, vision=VISION)


def batch_of(*rows) -> dict:
    """Always of as many rows: one shape is one compilation."""
    made = [make_row(samples, length=LENGTH, vision=VISION) for samples in rows]
    return stack(made + [EMPTY] * (len(SAMPLES) - len(made)))


@partial(jax.jit, static_argnums=0)
def scores_and_gradients(config, params, batch):
    def loss(params):
        logits = batch_logits(bind(config, params), batch)
        is_target = batch["targets"][..., None] == jnp.arange(logits.shape[-1])
        scores = jnp.sum(jax.nn.log_softmax(logits) * is_target, axis=-1)
        return -jnp.sum(scores * batch["weights"]), logits

    gradients, logits = jax.grad(loss, has_aux=True)(params)
    return logits, gradients


@pytest.fixture(scope="module")
def results():
    """(logits, gradients by name) of one packed row, and of a row for each sample."""
    params = golden.load_meta("mllama_tiny_meta", CONFIG)  # random gates among them
    found = []
    for rows in ([SAMPLES], [[each] for each in SAMPLES]):
        with jax.set_mesh(mesh := single_device_mesh()):
            logits, gradients = scores_and_gradients(CONFIG, params, place(batch_of(*rows), mesh))
        found.append((np.asarray(logits), jax.tree.map(np.asarray, flatten(gradients))))
    return found


def test_every_document_scores_as_alone(results):
    (packed, _), (alone, _) = results
    begin = 0
    for row, each in zip(alone, SAMPLES, strict=True):
        size = sum(len(document.tokens) for document in each.documents)
        np.testing.assert_allclose(packed[0, begin : begin + size], row[:size], rtol=0, atol=1e-5)
        begin += size
    assert begin == 40


def test_the_gradient_is_the_sum_of_those_of_the_documents(results):
    (_, packed), (_, alone) = results
    assert packed.keys() == alone.keys()
    for name, gradient in packed.items():
        scale = max(1.0, float(np.abs(alone[name]).max()))
        error = np.abs(gradient - alone[name]).max() / scale
        assert error <= 1e-5, name
    still = {name for name, gradient in packed.items() if not gradient.any()}
    assert not any("gate" in name or "attention" in name for name in still), still


def test_the_row_has_images_of_every_number_of_tiles():
    batch = batch_of(SAMPLES)
    assert sorted(batch["aspect"][0].prod(axis=-1).tolist()) == [1, 2, 2, 4]
