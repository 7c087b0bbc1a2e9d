"""Runs with LoRA: where they begin, what can be asked, and what is written of them."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from l32jax import api
from l32jax.checkpoint.adapters import own
from l32jax.checkpoint.dequantised import dequantised
from l32jax.checkpoint.engine.slices import Slices, load
from l32jax.checkpoint.formats import open_checkpoint
from l32jax.checkpoint.graft import graft
from l32jax.config import LlamaConfig, LoraConfig
from l32jax.conversion.convert import convert, save
from l32jax.errors import InputError
from l32jax.generate.model import Model
from l32jax.model.llama import init_params
from l32jax.model.parameters import flatten, is_lora, part_of, partition
from l32jax.presets import TINY_TEXT
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.sharding import single_device_mesh
from tests.checkpoint_tests.weights import random_params, targets
from tests.model_tests.test_lora import with_lora
from tests.train_tests.small import TINY_TEXT_SEEING

LORA = LoraConfig(rank=4, alpha=12.0)
TEXT, VISION = with_lora(TINY_TEXT, LORA), with_lora(TINY_TEXT_SEEING, LORA)
TOKENS = np.arange(1, 25)

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text models and a vision model, in which nothing is zero; and documents."""
    home = tmp_path_factory.mktemp("models")
    tokenizer = api.load("tiny-text").require_tokenizer()
    for seed, (name, config) in enumerate(
        {"base": TINY_TEXT, "instruct": TINY_TEXT, "vision": TINY_TEXT_SEEING}.items()
    ):
        known = tokenizer.with_image_token() if config.vision else tokenizer
        params = random_params(config, seed=seed)
        save(Model(config, params, known, single_device_mesh()), home / name, to="orbax")
    lines = [json.dumps({"text": f"number {n} " * (1 + n % 4)}) for n in range(60)]
    (home / "documents.jsonl").write_text("\n".join(lines))
    return home


def run_config(
    folder, directory, start: str, model=TEXT, parts=("lora",), **changes
) -> TrainConfig:
    data = DataConfig(mixture=((str(folder / "documents.jsonl"), 1.0),), batch_size=4, length=64)
    stage = StageConfig(
        name="adapting",
        num_steps=3,
        trains=parts,
        data=data,
        optimizer=OptimizerConfig(peak_lr=1e-2),
    )
    config = TrainConfig(
        model=model, stages=(stage,), directory=str(directory), start_from=str(folder / start)
    )
    return dataclasses.replace(config, **changes)


def beginning(config: TrainConfig) -> dict:
    return flatten(api._beginning(config, single_device_mesh()).params)


def fresh(model, seed: int) -> dict:
    with jax.set_mesh(single_device_mesh()):
        return flatten(jax.jit(partial(init_params, model))(jax.random.key(seed)))


def test_a_model_without_lora_gets_fresh_adapters(folder, tmp_path):
    begun = beginning(run_config(folder, tmp_path, "base", seed=5))
    born, base = fresh(TEXT, 5), flatten(random_params(TINY_TEXT, seed=0))
    assert begun.keys() == born.keys() and set(filter(is_lora, begun))
    for path, leaf in begun.items():
        np.testing.assert_array_equal(leaf, born[path] if is_lora(path) else base[path], path)


def test_a_text_model_gets_eyes_and_lora_at_once(folder, tmp_path):
    begun = beginning(run_config(folder, tmp_path, "base", VISION))
    known = language_model(0, VISION)
    for path, leaf in begun.items():
        if path in known:
            np.testing.assert_array_equal(leaf, known[path], path)
        elif path.endswith(("/lora_a", "/weight")):
            assert np.asarray(leaf).all(), path
    assert begun.keys() == flatten(targets(VISION)).keys() > known.keys()


def language_model(seed: int, model: LlamaConfig) -> dict[str, np.ndarray]:
    """What a vision model has of the text model of a seed."""
    slices = graft(Slices.of(random_params(TINY_TEXT, seed=seed)), TINY_TEXT, model)
    where = targets(model)
    return flatten(load(slices, partition(where, slices.shapes.__contains__)[0]))


@pytest.mark.parametrize(
    ("model", "part"), [(TINY_TEXT_SEEING, "adapter"), (VISION, "lora")], ids=["plain", "lora"]
)
def test_a_trunk_takes_the_place_of_the_language_model(folder, tmp_path, model, part):
    """And of nothing else: bit by bit."""
    trunk = str(folder / "instruct")
    config = run_config(folder, tmp_path, "vision", model, (part,), trunk_from=trunk)
    seen, replaced = flatten(random_params(TINY_TEXT_SEEING, seed=2)), language_model(1, model)
    begun = beginning(config)
    assert {path for path in begun if part_of(path, model) == "language_model"} == replaced.keys()
    for path, leaf in begun.items():
        if not is_lora(path):
            np.testing.assert_array_equal(leaf, replaced.get(path, seen[path]), path)


def test_another_trunk_is_refused(folder, tmp_path):
    config = run_config(folder, tmp_path, "vision", VISION, trunk_from=str(folder / "vision"))
    with pytest.raises(InputError, match="it is not the text model"):
        beginning(config)
    with pytest.raises(InputError, match="trunk_from='x' without start_from"):
        dataclasses.replace(config, trunk_from="x", start_from=None)


@pytest.fixture(scope="module", params=["float32", "int4"])
def run(folder, request, tmp_path_factory):
    """A run that has adapted, and what came of it."""
    directory = tmp_path_factory.mktemp("runs") / request.param
    config = run_config(folder, directory, "base", params=request.param)
    return config, api.run(config)


def arrays(slices: Slices) -> dict[str, np.ndarray]:
    return {str(home): np.asarray(slices.read(home, slice(None))) for home in slices.homes()}


def test_what_is_saved_of_a_run_is_what_came_of_it(run):
    config, trained = run
    saved, here = (
        arrays(slices)
        for slices in (
            open_checkpoint(config.directory).slices,
            dequantised(Slices.of(trained.params)),
        )
    )
    assert saved.keys() == here.keys()
    for home, array in here.items():
        assert array.dtype == saved[home].dtype, home
        np.testing.assert_array_equal(saved[home], array, err_msg=home)


def test_a_run_answers_with_its_adapters(run, folder):
    config, trained = run
    again, before = api.load(config.directory), api.load(folder / "base")
    assert again.config == TEXT
    difference = np.abs(again.logits(TOKENS) - trained.logits(TOKENS)).max()
    assert difference == 0 if config.params == "float32" else difference < 0.1
    assert np.abs(again.logits(TOKENS) - before.logits(TOKENS)).max() > 0.1
    asked = again.generate("number", max_new_tokens=2)
    assert isinstance(asked, str)


@pytest.mark.parametrize("to", ["hf", "orbax", "safetensors", "gguf"])
def test_conversion_merges(to, run, tmp_path):
    config, _ = run
    suffix = {"gguf": ".gguf", "safetensors": ".safetensors"}.get(to, "")
    path = tmp_path / f"merged{suffix}"
    convert(config.directory, path, to=to, dtype="float32", verify=True)
    found, expected = api.load(path), api.load(config.directory)
    assert found.config == TINY_TEXT
    np.testing.assert_allclose(found.logits(TOKENS), expected.logits(TOKENS), rtol=0, atol=1e-5)


def test_a_model_in_memory_is_saved_merged(run, tmp_path):
    config, trained = run
    save(trained, tmp_path / "memory")
    convert(config.directory, tmp_path / "disk")
    ours, theirs = (arrays(open_checkpoint(tmp_path / n).slices) for n in ("memory", "disk"))
    for home, array in ours.items():
        np.testing.assert_array_equal(array, theirs[home], err_msg=home)


def test_peft_computes_what_the_run_computes(run, tmp_path):
    """From the adapter alone, beside the base that the run had."""
    library = pytest.importorskip("peft")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, _ = run
    convert(config.directory, tmp_path / "adapter", to="peft", base="the base")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == LORA.rank
    save(base_of(config), tmp_path / "base", to="hf", dtype="float32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    adapted = library.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = adapted(input_ids=torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    ours = api.load(config.directory).logits(TOKENS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def base_of(config: TrainConfig) -> Model:
    """What a run's adapters are beside."""
    found = api.load(config.directory)
    slices, _ = own(Slices.of(found.params), TEXT)
    return Model(TINY_TEXT, load(slices, targets(TINY_TEXT)), found.tokenizer, found.mesh)


def test_a_run_starts_from_another_with_its_adapters(run, folder, tmp_path):
    config, trained = run
    begun = beginning(run_config(folder, tmp_path, config.directory))
    for path, leaf in flatten(trained.params).items():
        if is_lora(path):
            np.testing.assert_array_equal(begun[path], leaf, err_msg=path)


def test_what_has_no_lora_has_no_adapter_to_write(folder, tmp_path):
    with pytest.raises(InputError, match="it has no LoRA to write as peft"):
        convert(folder / "base", tmp_path / "x", to="peft")
