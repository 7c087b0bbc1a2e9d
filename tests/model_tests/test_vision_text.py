"""What images must not change: text beside and before them, and all of it behind closed gates."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from l32jax.checkpoint.engine.slices import Slices, load
from l32jax.checkpoint.graft import graft
from l32jax.config import LlamaConfig
from l32jax.data.batches import place
from l32jax.data.rows import VisionShape, make_row, stack
from l32jax.data.samples import Document, Sample
from l32jax.errors import InputError
from l32jax.generate.model import Model
from l32jax.model.llama import batch_logits, bind, init_params
from l32jax.model.parameters import combine, partition, trains
from l32jax.presets import TINY_TEXT, TINY_VISION, with_vision
from l32jax.sharding import single_device_mesh
from tests import golden
from tests.checkpoint_tests.weights import random_params, targets

IMAGE_ID = golden.VISION.decoder.vocab_size
LENGTH = 24


def on_one_device(function, *arguments):
    with jax.set_mesh(single_device_mesh()):
        return jax.tree.map(np.asarray, function(*arguments))


@partial(jax.jit, static_argnums=0)
def scores_of(config, params, batch):
    return batch_logits(bind(config, params), batch)


def logits(config, params, batch) -> np.ndarray:
    return on_one_device(scores_of, config, params, place(batch, single_device_mesh()))


def picture(seed: int, height: int = 56, width: int = 56) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def words(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, IMAGE_ID, length).tolist()


def row(samples, config=golden.VISION):
    shape = VisionShape.of(config, max_images=2, max_tiles=4)
    return make_row(samples, length=LENGTH, vision=shape)


def batch_of(*rows):
    """Always of three rows, the rest empty: one shape is one compilation."""
    return stack([*map(row, rows), *[row([])] * (3 - len(rows))])


def sample(tokens, images=()) -> Sample:
    return Sample.single(tokens, [1.0] * len(tokens), images)


@pytest.fixture(scope="module")
def params():
    """Random gates among them."""
    return golden.load_meta("mllama_tiny_meta", golden.VISION)


@pytest.mark.parametrize("max_tiles", [1, 4])
def test_sizes_of_one_keep_their_place(max_tiles):
    """One row, image, tile, tap, layer: a dimension of one must not be taken for another."""
    encoder = dataclasses.replace(
        golden.VISION.vision,
        taps=(0,),
        num_local_layers=1,
        num_global_layers=1,
        max_tiles=max_tiles,
    )
    decoder = dataclasses.replace(golden.VISION.decoder, num_groups=1, group_pattern=("cross",))
    config = LlamaConfig(decoder=decoder, vision=encoder)
    model = Model(config, random_params(config), None, single_device_mesh())
    tokens = [IMAGE_ID, *words(1, 5)]
    scores = model.logits(tokens, [picture(1)])
    assert np.isfinite(scores).all()
    ((first, *_),) = model.generate_tokens([(tokens, [picture(1)])], max_new_tokens=2)
    assert first == scores[-1].argmax()
    side_by_side = model.logits([tokens, tokens], [[picture(1)], [picture(2)]])
    np.testing.assert_allclose(side_by_side[0], scores, rtol=0, atol=1e-5)
    assert np.abs(side_by_side[1] - scores).max() > 1e-3


@pytest.fixture(scope="module")
def text_params():
    return random_params(TINY_TEXT)


def grafted_onto(text_params, config: LlamaConfig):
    """Beside the text model's parameters, random ones with closed gates."""
    fresh = on_one_device(jax.jit(partial(init_params, config)), jax.random.key(0))
    is_text = trains(("language_model",), config)
    trunk, _ = partition(targets(config), is_text)
    moved = load(graft(Slices.of(text_params), TINY_TEXT, config), trunk)
    return combine(moved, partition(fresh, is_text)[1])


@pytest.fixture(scope="module")
def grafted(text_params):
    return grafted_onto(text_params, TINY_VISION)


def text_batch(seed: int = 0):
    rows = [make_row([sample(words(seed + r, LENGTH - r))], length=LENGTH) for r in range(3)]
    return stack(rows)


def with_images(batch, config):
    """The same rows, each beside two pictures; all tokens of all rows but the first see one."""
    seeing = [
        row(
            [sample([config.decoder.vocab_size] * 2, [picture(r), picture(9 + r, 100, 50)])], config
        )
        for r in range(len(batch["tokens"]))
    ]
    vision = stack(seeing)
    vision = {name: vision[name] for name in vision if name not in batch}
    per_tile = config.vision.tokens_per_tile
    vision["vision_start"] = np.zeros_like(batch["tokens"])
    vision["vision_stop"] = np.full_like(batch["tokens"], per_tile)
    vision["vision_stop"][0] = 0
    return batch | vision


@pytest.mark.parametrize("every", [2, 4])
def test_a_grafted_model_scores_text_as_before_bit_by_bit(text_params, every):
    config = with_vision(TINY_TEXT, TINY_VISION.vision, every=every)
    batch = text_batch()
    before = logits(TINY_TEXT, text_params, batch)
    after = logits(config, grafted_onto(text_params, config), batch)
    np.testing.assert_array_equal(after, before)


def test_a_grafted_model_ignores_images_bit_by_bit(text_params, grafted):
    batch = text_batch()
    seeing = logits(TINY_VISION, grafted, with_images(batch, TINY_VISION))
    np.testing.assert_array_equal(seeing, logits(TINY_TEXT, text_params, batch))


def test_open_gates_do_let_the_images_in(grafted):
    """The test above would say nothing of a model that is blind for other reasons."""
    opened = jax.tree.map_with_path(
        lambda path, leaf: leaf + 0.5 if str(path[-1].key).endswith("_gate") else leaf, grafted
    )
    batch = with_images(text_batch(), TINY_VISION)
    closed, seen = (logits(TINY_VISION, params, batch) for params in (grafted, opened))
    np.testing.assert_array_equal(seen[0], closed[0])
    assert (np.abs(seen[1:] - closed[1:]).max(axis=-1) > 1e-3)[batch["stop"][1:] > 0].all()


def test_a_graft_onto_another_trunk_is_refused(text_params):
    narrow = dataclasses.replace(TINY_TEXT.decoder, mlp_dim=96)
    other = with_vision(dataclasses.replace(TINY_TEXT, decoder=narrow), TINY_VISION.vision)
    for wrong in (other, TINY_TEXT):
        with pytest.raises(InputError, match="presets.with_vision"):
            graft(Slices.of(text_params), TINY_VISION if wrong is TINY_TEXT else TINY_TEXT, wrong)


def changed_by(params, batch, name: str, where) -> np.ndarray:
    """[b t]: whether any score of a token changes when batch[name][where] does."""
    other = batch | {name: batch[name].copy()}
    other[name][where] = other[name][where] + 1
    one, two = (logits(golden.VISION, params, b) for b in (batch, other))
    return (one != two).any(axis=-1)


def test_an_image_changes_only_what_comes_after_it_in_its_row(params):
    looking = [*words(0, 5), IMAGE_ID, *words(1, 8)]
    batch = batch_of([sample(looking, [picture(0)])], [sample(words(2, 14))])
    changed = changed_by(params, batch, "tiles", (0, 0, 0))
    assert not changed[1:].any()
    assert changed[0].tolist() == [False] * 5 + [True] * 9 + [False] * (LENGTH - 14)


def test_each_document_of_a_row_has_images_of_its_own(params):
    """Of two packed documents, the second one's picture and words are nothing to the first."""
    samples = [sample([IMAGE_ID, *words(seed, 6)], [picture(seed, 50, 100)]) for seed in range(2)]
    batch = batch_of(samples)
    second = [False] * 7 + [True] * 7 + [False] * (LENGTH - 14)
    first = [True] * 7 + [False] * (LENGTH - 7)
    assert changed_by(params, batch, "tiles", (0, 1, 0))[0].tolist() == second
    assert changed_by(params, batch, "tiles", (0, 0, 0))[0].tolist() == first
    words_of_second = changed_by(params, batch, "tokens", (0, 9))[0]
    assert words_of_second.tolist() == [False] * 9 + [True] * 5 + [False] * (LENGTH - 14)


def test_packed_documents_score_as_they_do_alone(params):
    one = sample([*words(0, 2), IMAGE_ID, *words(1, 3)], [picture(0, 100, 50)])
    shared = [IMAGE_ID, *words(3, 4)], [IMAGE_ID, *words(4, 5)]
    two = Sample(tuple(Document(t, [1.0] * len(t), (0,)) for t in shared), (picture(1),))
    packed = logits(golden.VISION, params, batch_of([one, two]))[0]
    singles = [one, *(sample(tokens, [picture(1)]) for tokens in shared)]
    alone = logits(golden.VISION, params, batch_of(*([single] for single in singles)))
    begin = 0
    for scores, single in zip(alone, singles, strict=True):
        size = len(single.documents[0].tokens)
        np.testing.assert_allclose(packed[begin : begin + size], scores[:size], rtol=0, atol=1e-5)
        begin += size


def test_tiles_and_slots_that_no_image_uses_change_nothing(params):
    tokens = [*words(0, 2), IMAGE_ID, *words(1, 3)]
    batch = batch_of([sample(tokens, [picture(0)])])
    assert batch["aspect"][0].tolist() == [[1, 1], [0, 0]]
    assert not changed_by(params, batch, "tiles", (0, 1)).any()
