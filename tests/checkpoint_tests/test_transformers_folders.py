"""The folders that `convert` makes of any format are whole to transformers: weights, tokenizer,
image processor and generation config load without a word, and say what ours say. And the reverse
for each way in which its releases save a model.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import l32jax
from l32jax.checkpoint import hugging_face
from l32jax.checkpoint.engine.slices import load
from l32jax.checkpoint.formats import open_checkpoint
from l32jax.checkpoint.hugging_face_config import read_config
from l32jax.config import RopeScaling
from l32jax.conversion.convert import convert
from l32jax.data.images import normalise, preprocess
from l32jax.errors import InputError
from l32jax.presets import PRESETS
from tests import golden
from tests.checkpoint_tests.test_transformers import (
    LIMIT,
    run,
    silence_is_kept,
    transformers_load,
)
from tests.checkpoint_tests.weights import (
    assert_same,
    export_hugging_face,
    random_params,
    targets,
)
from tests.data_tests.small_tokenizer_files import small_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

TOKENIZER = small_tokenizer()
IDS = hugging_face.TokenIds(TOKENIZER.bos_id, TOKENIZER.stop_ids, TOKENIZER.pad_id)
SENTENCE = "<|begin_of_text|>What is the sum of 12 and 345?<|eot_id|>"
IMAGE = "<|image|>"


def sized(name: str, **changes):
    """transformers warns of a context that is not longer than what RoPE was scaled from."""
    changes = {"max_context": 16_384} | changes
    decoder = dataclasses.replace(PRESETS[name].decoder, vocab_size=TOKENIZER.num_tokens, **changes)
    return dataclasses.replace(PRESETS[name], decoder=decoder)


MODELS = {"text": sized("tiny-text"), "vision": sized("tiny-vision", tied_embedding=False)}
KINDS = {
    "text": transformers.AutoModelForCausalLM,
    "vision": transformers.MllamaForConditionalGeneration,
}
ROUTES = [
    *(("text", via) for via in ("meta", "orbax", "gguf", "safetensors")),
    *(("vision", via) for via in ("meta", "orbax", "safetensors")),  # GGUF has no vision models
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Folders of Hugging Face's that nothing has been through, and their parameters."""
    home = tmp_path_factory.mktemp("original")
    params = {name: random_params(config) for name, config in MODELS.items()}
    for name, config in MODELS.items():
        export_hugging_face(
            params[name],
            config,
            home / name,
            dtype=np.float32,
            ids=IDS,
            extra_files=TOKENIZER.files(),
        )
    return home, params


@pytest.fixture(scope="module", params=ROUTES, ids="-".join)
def folder(request, original, tmp_path_factory):
    """(name of the model, what `convert` made of a folder, file or run that holds it)."""
    (name, via), home = request.param, tmp_path_factory.mktemp("folder")
    convert(original[0] / name, home / "between", to=via)
    given = original[0] / name if via == "safetensors" else None
    convert(home / "between", home / "hf", to="hf", tokenizer=given, verify=True)
    return name, home / "hf"


@pytest.fixture(scope="module")
def model(folder):
    name, path = folder
    return transformers_load(KINDS[name], path)


def test_generation_begins_and_ends_as_the_tokenizer_says(folder, model):
    config = model.generation_config
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert config.bos_token_id == TOKENIZER.bos_id
    assert tuple(stops) == TOKENIZER.stop_ids
    assert config.pad_token_id == TOKENIZER.pad_id
    generated = json.loads((folder[1] / "generation_config.json").read_text())
    with silence_is_kept():
        again = transformers.GenerationConfig.from_pretrained(folder[1])
    assert {key: getattr(again, key) for key in generated} == generated


def test_the_tokenizer_gives_the_same_ids(folder):
    name, path = folder
    with silence_is_kept():
        theirs = transformers.AutoTokenizer.from_pretrained(path)
    text = SENTENCE + (IMAGE if name == "vision" else "")
    ours = l32jax.load(path).require_tokenizer()
    ids = theirs.encode(text, add_special_tokens=False)
    assert ids == ours.encode(text, allow_special=True)
    assert ids[: len(ids) - (name == "vision")] == TOKENIZER.encode(SENTENCE, allow_special=True)
    assert (ids[-1] == MODELS[name].decoder.vocab_size) == (name == "vision")


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(28, 28), (40, 90), (90, 40), (200, 30), (7, 60)]
    return [Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8), "RGB") for size in sizes]


def test_the_image_processor_gives_the_same_pixels(folder):
    name, path = folder
    if name == "text":
        assert not (path / "preprocessor_config.json").exists()
        return
    size = MODELS[name].vision.image_size
    with silence_is_kept():
        alone = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
        whole = transformers.AutoProcessor.from_pretrained(path, backend="pil")
    for picture in pictures():
        tiles, _ = preprocess(picture, tile_size=size)
        for theirs in (
            alone([picture], return_tensors="np"),
            whole(text=IMAGE, images=[picture], return_tensors="np"),
        ):
            pixels = theirs["pixel_values"][0, 0]
            np.testing.assert_allclose(pixels[: len(tiles)], normalise(tiles), rtol=0, atol=1e-6)
            assert not pixels[len(tiles) :].any()


def test_both_compute_the_same_from_text_and_picture(folder, model):
    name, path = folder
    ours = l32jax.load(path, compat="hf", dtype=np.float32)
    if name == "text":
        ids = ours.encode(SENTENCE, raw=True)[0]
        expected, found = run(model, input_ids=np.array([ids]))[0], ours.logits(ids)
    else:
        with silence_is_kept():
            processor = transformers.AutoProcessor.from_pretrained(path, backend="pil")
            inputs = processor(
                text=IMAGE + SENTENCE,
                images=[pictures()[1]],
                add_special_tokens=False,
                return_tensors="np",
            )
        expected = run(model, **inputs)[0]
        found = ours.logits(inputs["input_ids"][0], [pictures()[1]])
        blind = run(model, input_ids=np.maximum(inputs["input_ids"] - 1, 0))[0]
        assert np.abs(expected - blind).max() > 0.1  # the picture matters in this comparison
    np.testing.assert_allclose(found, expected, rtol=0, atol=LIMIT)
    assert expected.std() > 0.3


SCALINGS = {"none": None, "8": RopeScaling(factor=8.0), "32": RopeScaling(factor=32.0)}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_text_exports_compute_the_same_near_and_far(scaling, tied, tmp_path):
    """The context that was trained is 64 tokens; far positions are where scaling shows."""
    rope = SCALINGS[scaling] and dataclasses.replace(SCALINGS[scaling], original_context=64)
    config = sized("tiny-text", rope_scaling=rope, tied_embedding=tied)
    params = random_params(config)
    export_hugging_face(params, config, tmp_path / "x", dtype=np.float32, ids=IDS)
    model = transformers_load(KINDS["text"], tmp_path / "x")
    assert model.config.tie_word_embeddings == tied
    tokens = np.random.default_rng(0).integers(0, config.decoder.vocab_size, (1, 20))
    positions = np.array([[*range(10), *range(900, 910)]])
    expected = run(
        model, input_ids=tokens, position_ids=positions, attention_mask=np.ones_like(tokens)
    )
    found = golden.logits(config, params, tokens, positions=positions)
    np.testing.assert_allclose(found, expected, rtol=0, atol=LIMIT)


def saved_by_transformers(model, path, **how):
    with silence_is_kept():
        model.save_pretrained(path, **how)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_shards_of_transformers_come_back_the_same(name, original, tmp_path):
    home, params = original
    model = transformers_load(KINDS[name], home / name)
    path = saved_by_transformers(model, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 2
    assert "rope_parameters" in (path / "config.json").read_text()  # what releases 5 write
    convert(path, tmp_path / "orbax", tokenizer=home / name, verify=True)
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf", verify=True)
    config = read_config(path)
    assert config == read_config(home / name)
    found = load(open_checkpoint(tmp_path / "hf").slices, targets(config))
    assert_same(found, params[name])
    again = transformers_load(KINDS[name], tmp_path / "hf").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_models_without_a_tokenizer_load_too(name, original, tmp_path):
    """Not in silence: transformers then takes Llama 3's first token, which a small model lacks."""
    nothing = hugging_face.TokenIds(None, (), None)
    params, config = original[1][name], MODELS[name]
    export_hugging_face(params, config, tmp_path / "x", dtype=np.float32, ids=nothing)
    _, report = KINDS[name].from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("name", MODELS)
def test_names_of_a_state_dict_and_a_stored_tied_head_load(name, original, tmp_path):
    """What users write who save the state dict themselves, config beside it."""
    home, params = original
    model = transformers_load(KINDS[name], home / name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert "lm_head.weight" in state
    assert any(key.startswith("model.language_model.") for key in state) == (name == "vision")
    model.config.save_pretrained(tmp_path)
    safetensors_torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    opened = open_checkpoint(tmp_path)
    assert_same(load(opened.slices, targets(opened.config)), params[name])
    if name == "text":
        state["lm_head.weight"][3, 4] += 1
        safetensors_torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="though the config ties them"):
            open_checkpoint(tmp_path)


def test_rows_of_tile_tables_that_were_trained_apart_are_refused(original, tmp_path):
    model = transformers_load(KINDS["vision"], original[0] / "vision")
    table = model.state_dict()["model.vision_model.pre_tile_positional_embedding.embedding.weight"]
    assert table.shape[0] == 9
    table[6, 0] += 1
    path = saved_by_transformers(model, tmp_path / "apart")
    slices = open_checkpoint(path).slices
    with pytest.raises(InputError, match="its rows disagree about the tile"):
        load(slices, targets(MODELS["vision"]))
    with pytest.raises(InputError, match="its rows disagree about the tile"):
        convert(path, tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def configs_of_releases() -> dict[str, dict]:
    return golden.document("hugging_face_configs.json")


@pytest.mark.parametrize("release", configs_of_releases())
def test_configs_that_releases_wrote_give_the_same_model(release, original, tmp_path):
    """By 4.45.2, 4.57.6 and 5.23.0 themselves, see the file: `save_pretrained` of a config."""
    for name, content in configs_of_releases()[release].items():
        path = shutil.copytree(original[0] / name, tmp_path / name)
        (path / "config.json").write_text(json.dumps(content))
        assert read_config(path) == read_config(original[0] / name)
        again = transformers_load(KINDS[name], path)
        assert again.config.get_text_config().rope_parameters["rope_type"] == "llama3"
