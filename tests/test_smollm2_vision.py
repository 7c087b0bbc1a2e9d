"""SmolLM2-135M beside a small image encoder: it learns to see, and its text stays as it was."""

import dataclasses

import numpy as np
import pytest

import l32jax
from configs import smollm2_vision
from l32jax import api
from l32jax.data.easy_vqa import EasyVqa
from l32jax.model.parameters import flatten
from l32jax.run_config import TrainConfig
from l32jax.sharding import single_device_mesh
from tests.data_tests.real_tokenizers import smollm2_file

QUESTIONS = ("What is the capital of France?", "Explain gravity to a child.")
NEW_TOKENS = 12

pytestmark = pytest.mark.slow


def short(directory, start_from) -> TrainConfig:
    """The config's run, two steps a stage, of small batches."""
    config = smollm2_vision.config()
    stages = tuple(
        dataclasses.replace(
            stage,
            num_steps=2,
            data=dataclasses.replace(stage.data, batch_size=2),
            optimizer=dataclasses.replace(stage.optimizer, warmup_steps=0),
        )
        for stage in config.stages
    )
    changes = {"directory": str(directory), "start_from": str(start_from), "stages": stages}
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def text():
    return l32jax.load(smollm2_file())


@pytest.fixture(scope="module")
def run(one_device, tmp_path_factory):
    """The folder of a run that has taken all its steps."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    api.run(short(folder, smollm2_file()))
    return folder


@pytest.fixture(scope="module")
def seeing(run):
    return l32jax.load(run)


def test_it_starts_from_text_that_scores_as_before_bit_by_bit(text, tmp_path):
    begun = api._beginning(short(tmp_path, smollm2_file()), single_device_mesh())
    for question in QUESTIONS:
        tokens, _ = text.encode(question)
        assert begun.encode(question) == (tokens, [])
        np.testing.assert_array_equal(begun.logits(tokens), text.logits(tokens))


def test_training_changed_what_it_sees_and_not_a_bit_of_its_text(text, seeing):
    gates = [leaf for path, leaf in flatten(seeing.params).items() if path.endswith("_gate")]
    assert gates and all(np.asarray(gate).all() for gate in gates if gate.shape == (5,))
    for question in QUESTIONS:
        tokens, _ = text.encode(question)
        np.testing.assert_array_equal(seeing.logits(tokens), text.logits(tokens))
    asked = list(QUESTIONS)
    told = text.generate(asked, max_new_tokens=NEW_TOKENS)
    assert seeing.generate(asked, max_new_tokens=NEW_TOKENS) == told


def test_it_can_be_asked_about_pictures(seeing):
    pictures = [scene.image for scene in EasyVqa("test")[:2]]
    tokens, images = seeing.encode("what color is the shape?", pictures[:1])
    assert (tokens.count(seeing.tokenizer.image_id), images) == (1, pictures[:1])
    one, other = (seeing.logits(tokens, [picture]) for picture in pictures)
    assert np.isfinite(one).all() and np.abs(one - other).max() > 1e-3
    told = seeing.generate(
        ["what color is the shape?"] * 2, images=[[p] for p in pictures], max_new_tokens=4
    )
    assert len(told) == 2 and "<|image|>" not in "".join(told)
    seeing.generate("<|image|>a", images=pictures[:1], raw=True, max_new_tokens=2)
