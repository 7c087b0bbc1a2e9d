"""Float32 parity with Meta's own code, and with the two places where Hugging Face differs."""

import dataclasses

import jax
import numpy as np
import pytest

from l32jax.config import RopeScaling
from l32jax.model.llama import bind
from l32jax.sharding import single_device_mesh
from tests import golden

LIMIT = 5e-5
TOKENS_PER_TILE = golden.VISION.vision.tokens_per_tile


@pytest.fixture(scope="module")
def data():
    return golden.arrays("mllama_tiny_meta")


@pytest.fixture(scope="module")
def params():
    return golden.load_meta("mllama_tiny_meta", golden.VISION)


def vision_features(config, params, data):
    images = golden.images(data["imgs"], data["ars"])

    @jax.jit
    def run(params, images):
        model = bind(config, params)
        features = model.features(images)
        return features, model.project(features)

    with jax.set_mesh(single_device_mesh()):
        return [np.asarray(a) for a in run(params, images)]


def image_logits(config, params, data):
    """Row 0 has text before its image of 1 x 2 tiles, row 1 begins with one of 2 x 2."""
    seen = golden.seen([3, 0], [2, 4], data["toks"].shape[1], TOKENS_PER_TILE)
    images = golden.images(data["imgs"], data["ars"])
    return golden.logits(config, params, data["toks"], images=images, seen_images=seen)


def mixed_logits(config, params, data):
    """Row 0 has no image, row 1 one of 2 x 2 tiles."""
    images = golden.images(data["im2"], np.array([[[0, 0]], [[2, 2]]]))
    seen = golden.seen([None, 0], [0, 4], data["t2"].shape[1], TOKENS_PER_TILE)
    return golden.logits(config, params, data["t2"], images=images, seen_images=seen)


def text_logits(config, params, data):
    return golden.logits(config, params, np.minimum(data["toks"], 255))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT)


def test_vision_features_equal_metas(params, data):
    features, projected = vision_features(golden.VISION, params, data)
    close(features, data["enc"])
    close(projected, data["vt"])


def test_image_logits_equal_metas(params, data):
    close(image_logits(golden.VISION, params, data), data["logits"])


def test_mixed_batch_equals_metas(params, data):
    close(mixed_logits(golden.VISION, params, data), data["logits_mixed"])


def test_text_of_a_vision_model_equals_metas(params, data):
    close(text_logits(golden.VISION, params, data), data["logits_txt"])


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("mllama_tiny_hf_4_45_2", {"row_mask": "hf"}),
        ("mllama_tiny_hf_5_23_0", {"row_mask": "hf", "vision_intermediates": "hf"}),
    ],
)
def test_compat_reproduces_hugging_face(name, switches, params, data):
    theirs = golden.arrays(name)
    config = golden.with_compat(golden.VISION, **switches)
    close(vision_features(config, params, data)[0], theirs["vision_last"])
    close(image_logits(config, params, data), theirs["logits"])
    close(mixed_logits(config, params, data), theirs["logits_mixed"])
    close(text_logits(config, params, data), theirs["logits_txt"])


@pytest.mark.parametrize("switch", ["row_mask", "vision_intermediates"])
def test_each_deviation_has_its_own_switch(switch, params, data):
    ours = image_logits(golden.VISION, params, data)
    theirs = image_logits(golden.with_compat(golden.VISION, **{switch: "hf"}), params, data)
    assert np.abs(ours - theirs).max() > 0.05


def test_text_model_equals_metas():
    data, params = (
        golden.arrays("llama_tiny_meta"),
        golden.load_meta("llama_tiny_meta", golden.TEXT),
    )
    close(golden.logits(golden.TEXT, params, data["x"]), data["logits_meta_f8"])


@pytest.mark.parametrize("factor", [8, 32])
def test_far_positions_need_the_configured_rope_factor(factor):
    """Positions 0 to 19 and 100,000 to 100,019: a wrong factor shows only there."""
    data, params = (
        golden.arrays("llama_tiny_meta"),
        golden.load_meta("llama_tiny_meta", golden.TEXT),
    )
    scaling = RopeScaling(factor=float(factor))
    decoder = dataclasses.replace(golden.TEXT.decoder, rope_scaling=scaling)
    config = dataclasses.replace(golden.TEXT, decoder=decoder)
    close(golden.logits(config, params, data["x"]), data[f"logits_hf_f{factor}"])
    far = golden.logits(config, params, data["x"], positions=data["pos_gap"])
    close(far, data[f"logits_hf_f{factor}_gap"])
