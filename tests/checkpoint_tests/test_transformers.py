"""What transformers saves, this package loads, and the reverse; and both compute the same."""

import contextlib
import dataclasses
import json
import logging
import warnings

import jax
import numpy as np
import pytest

from l32jax.checkpoint import hugging_face
from l32jax.checkpoint.engine.slices import load
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.hugging_face_config import read_config
from tests import golden
from tests.checkpoint_tests.weights import (
    assert_same,
    export_hugging_face,
    random_params,
    targets,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LIMIT = 5e-5
IDS = hugging_face.TokenIds(begin=1, stop=(2, 3), pad=0)
VISION = golden.with_compat(golden.VISION, row_mask="hf", vision_intermediates="hf")
RATIO_IDS = {(1, 2): 2, (2, 2): 6}


@contextlib.contextmanager
def silence_is_kept():
    """Fails on a line from transformers' loggers, and on a Python warning."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    assert lines == []


def transformers_load(kind, directory):
    with silence_is_kept():
        model, report = kind.from_pretrained(
            directory, dtype="float32", attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Directories of a vision and a text model, and the parameters in them."""
    home = tmp_path_factory.mktemp("exported")
    params = {}
    for name, config in {"vision": VISION, "text": golden.TEXT}.items():
        params[name] = random_params(config)
        export_hugging_face(params[name], config, home / name, dtype=np.float32, ids=IDS)
    return home, params


@pytest.fixture(scope="module")
def vision_model(exported):
    kind = transformers.MllamaForConditionalGeneration
    return transformers_load(kind, exported[0] / "vision")


@pytest.fixture(scope="module")
def text_model(exported):
    return transformers_load(transformers.LlamaForCausalLM, exported[0] / "text")


def run(model, **inputs):
    with torch.no_grad():
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        return model(**tensors).logits.numpy()


def test_vision_logits_equal_transformers(exported, vision_model):
    """Row 0 has text before its image of 1 x 2 tiles, row 1 begins with one of 2 x 2."""
    data = golden.arrays("mllama_tiny_meta")
    tokens, starts, num_tiles = data["toks"], [3, 0], [2, 4]
    length = tokens.shape[1]
    sees = np.zeros((2, length, 1, 4), np.int64)
    for row, (start, tiles) in enumerate(zip(starts, num_tiles, strict=True)):
        sees[row, start:, 0, :tiles] = 1
    theirs = run(
        vision_model,
        input_ids=tokens,
        attention_mask=np.ones_like(tokens),
        pixel_values=data["imgs"],
        aspect_ratio_ids=np.array([[RATIO_IDS[tuple(ratio[0])]] for ratio in data["ars"]]),
        aspect_ratio_mask=sees[:, -1],
        cross_attention_mask=sees,
    )
    seen = golden.seen(starts, num_tiles, length, VISION.vision.tokens_per_tile)
    images = golden.images(data["imgs"], data["ars"])
    ours = golden.logits(VISION, exported[1]["vision"], tokens, images=images, seen_images=seen)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT)
    assert theirs.std() > 0.5
    blind = golden.logits(VISION, exported[1]["vision"], np.minimum(tokens, 255))
    assert np.abs(blind - theirs).max() > 0.1  # the images matter in this comparison


def test_text_logits_equal_transformers_near_and_far(exported, text_model):
    """The far positions are 0 to 19 and 100,000 to 100,019: they show how RoPE is scaled."""
    data = golden.arrays("llama_tiny_meta")
    tokens = data["x"]
    near = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    logits = []
    for positions in (near, data["pos_gap"]):
        theirs = run(
            text_model,
            input_ids=tokens,
            position_ids=positions,
            attention_mask=np.ones_like(tokens),
        )
        logits.append(golden.logits(golden.TEXT, exported[1]["text"], tokens, positions=positions))
        np.testing.assert_allclose(logits[-1], theirs, rtol=0, atol=LIMIT)
    assert np.abs(logits[1] - logits[0]).max() > 0.1


@pytest.mark.parametrize("name", ["vision", "text"])
def test_what_transformers_saves_loads_bit_by_bit(name, exported, request, tmp_path):
    model = request.getfixturevalue(f"{name}_model")
    model.save_pretrained(tmp_path)
    assert "rope_parameters" in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    config = read_config(tmp_path)
    assert config == (golden.VISION if name == "vision" else golden.TEXT)
    assert_same(
        load(hugging_face.open_directory(tmp_path, config), targets(config)), exported[1][name]
    )


def test_names_of_a_vision_model_in_memory_load_too(exported, vision_model):
    arrays = {name: tensor.numpy() for name, tensor in vision_model.state_dict().items()}
    assert "model.language_model.norm.weight" in arrays
    source = Source.of(arrays, "memory")
    ours = load(hugging_face.open_tensors(source, golden.VISION), targets(golden.VISION))
    assert_same(ours, exported[1]["vision"])


def test_tied_text_model_crosses_both_ways(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_config(tmp_path / "theirs")
    assert ours.decoder.tied_embedding and ours.decoder.rope_scaling is None
    params = load(hugging_face.open_directory(tmp_path / "theirs", ours), targets(ours))
    tokens = np.random.default_rng(0).integers(0, 99, (2, 17))
    expected = run(theirs, input_ids=tokens)
    np.testing.assert_allclose(golden.logits(ours, params, tokens), expected, rtol=0, atol=LIMIT)
    export_hugging_face(params, ours, tmp_path / "ours", dtype=np.float32, ids=IDS)
    again = transformers_load(transformers.LlamaForCausalLM, tmp_path / "ours")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_tied_vision_model_gives_transformers_its_head(tmp_path, exported):
    """transformers has no tied vision models: the head becomes a copy, the results stay."""
    decoder = dataclasses.replace(golden.VISION.decoder, tied_embedding=True)
    config = dataclasses.replace(golden.VISION, decoder=decoder)
    params = jax.tree.map(lambda leaf: leaf, exported[1]["vision"])
    params["decoder"] = {k: v for k, v in params["decoder"].items() if k != "head"}
    export_hugging_face(params, config, tmp_path / "tied", dtype=np.float32, ids=IDS)
    model = transformers_load(transformers.MllamaForConditionalGeneration, tmp_path / "tied")
    tokens = np.arange(12)[None]
    expected = run(model, input_ids=tokens)
    np.testing.assert_allclose(golden.logits(config, params, tokens), expected, rtol=0, atol=LIMIT)
