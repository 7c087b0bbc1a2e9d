"""Where a run begins: at its own model's weights, or at the text model that it is built on."""

import base64
import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from l32jax import api
from l32jax.config import LlamaConfig
from l32jax.conversion.convert import save
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.generate.model import Model
from l32jax.model.llama import init_params
from l32jax.model.parameters import flatten, part_of
from l32jax.objective_config import Teacher
from l32jax.presets import TINY_TEXT, TINY_VISION, with_vision
from l32jax.run_config import DataConfig, MeshConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.sharding import make_mesh, single_device_mesh

assert TINY_VISION.vision is not None
TOWER = dataclasses.replace(TINY_VISION.vision, num_local_layers=1, taps=(0,))  # soon compiled
MODEL = with_vision(TINY_TEXT, TOWER, every=2)
QUESTION = "what color is the shape?"

pytestmark = pytest.mark.usefixtures("one_device")


def run_config(directory, start_from, model: LlamaConfig = MODEL, **changes) -> TrainConfig:
    captions = DataConfig(
        mixture=(("easy-vqa/train/captions", 1.0),), batch_size=4, length=64, max_images=2
    )
    stage = StageConfig(
        name="seeing",
        num_steps=2,
        trains=("vision_tower", "adapter"),
        data=captions,
        optimizer=OptimizerConfig(peak_lr=1e-2, gate_rate=10.0),
    )
    config = TrainConfig(
        model=model,
        stages=(stage,),
        directory=str(directory),
        start_from=str(start_from),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text model's folder, and the model."""
    folder = tmp_path_factory.mktemp("text") / "model"
    model = api.load("tiny-text", seed=3)
    save(model, folder, to="hf")
    return folder, model


def test_a_teacher_has_the_tokenizer_of_its_student(tmp_path):
    words = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
    lines = [f"{word} {(place + 100) % 256}" for place, word in enumerate(words)]
    (tmp_path / "tokenizer.model").write_text("\n".join(sorted(lines, key=_rank)) + "\n")
    other = Tokenizer.from_file(tmp_path / "tokenizer.model")
    config = run_config(tmp_path, "none")
    wise = Teacher(model=TINY_TEXT, start_from="tiny-text")
    with pytest.raises(InputError, match="teacher 'tiny-text': its tokenizer is not the model's"):
        api._teacher(config, other, single_device_mesh(), wise)
    own = api.load("tiny-text").require_tokenizer()
    assert api._teacher(config, own, single_device_mesh(), wise)["decoder"]


def _rank(line: str) -> int:
    return int(line.split()[1])


def test_a_mesh_that_does_not_divide_a_model_is_told(tmp_path):
    decoder = dataclasses.replace(TINY_TEXT.decoder, mlp_dim=95)
    config = LlamaConfig(decoder=decoder)
    with jax.set_mesh(single_device_mesh()):
        params = init_params(config, jax.random.key(0))
    save(Model(config, params, None, single_device_mesh()), tmp_path / "odd")
    with pytest.raises(InputError, match="mlp_dim=95 of the model: the mesh's axis tensor of 2"):
        api.load(tmp_path / "odd", mesh=make_mesh(MeshConfig(data=4, tensor=2)))


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    """A run, in larger tiles than its model's, and what came of it."""
    folder, _ = text
    config = run_config(tmp_path_factory.mktemp("run"), folder)
    (stage,) = config.stages
    config = dataclasses.replace(config, stages=(dataclasses.replace(stage, image_size=42),))
    return config, api.run(config)


def beginning(config: TrainConfig, mesh: Mesh | None = None) -> api.Model:
    return api._beginning(config, mesh or single_device_mesh())


def test_a_vision_run_keeps_the_text_of_the_model_it_starts_from(text, done):
    _, model = text
    config, trained = done
    tokens, _ = model.encode(QUESTION)
    again = api.load(config.directory)
    for seeing in (trained, again):
        np.testing.assert_array_equal(seeing.logits(tokens), model.logits(tokens))
    gates = [leaf for path, leaf in flatten(again.params).items() if path.endswith("_gate")]
    assert all(np.any(gate) for gate in gates if gate.ndim)


def test_what_came_of_a_run_looks_at_pictures_as_its_last_stage_did(done):
    config, trained = done
    again = api.load(config.directory)
    assert trained.config == again.config == config.model_of(0) != config.model
    picture = np.full((40, 70, 3), 200, np.uint8)
    tokens, images = trained.encode(QUESTION, [picture])
    np.testing.assert_array_equal(trained.logits(tokens, images), again.logits(tokens, images))
    told = trained.generate(QUESTION, images=[picture], max_new_tokens=2)
    assert told == again.generate(QUESTION, images=[picture], max_new_tokens=2)


def test_what_the_text_model_lacks_is_born_by_the_seed(text, tmp_path):
    folder, _ = text
    begun = beginning(run_config(tmp_path, folder, seed=5))
    with jax.set_mesh(single_device_mesh()):
        fresh = flatten(jax.jit(partial(init_params, MODEL))(jax.random.key(5)))
    ours = flatten(begun.params)
    assert ours.keys() == fresh.keys()
    for path, leaf in ours.items():
        if part_of(path, MODEL) != "language_model":
            np.testing.assert_array_equal(leaf, fresh[path], path)


@pytest.mark.parametrize("start", ["tiny-text", "folder"])
def test_each_layer_of_the_text_model_has_its_place(start, text, tmp_path):
    folder, model = text
    config = run_config(tmp_path, folder if start == "folder" else start, seed=3)
    blocks = beginning(config).params["decoder"]["groups"]["blocks"]
    theirs = model.params["decoder"]["groups"]["blocks"][0]
    for layer in range(4):
        group, nth = divmod(layer, 2)
        slot = (0, 2)[nth]  # of ("self", "cross", "self")
        ours = jax.tree.map(lambda leaf, at=group: np.asarray(leaf[at]), blocks[slot])
        layers = jax.tree.map(lambda leaf, at=layer: np.asarray(leaf[at]), theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, layers)


def test_a_graft_on_a_mesh_is_born_there_and_the_same(text, tmp_path):
    folder, _ = text
    config = run_config(tmp_path, folder)
    spread = beginning(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    alone = flatten(beginning(config).params)
    sharded = 0
    for path, leaf in flatten(spread.params).items():
        np.testing.assert_array_equal(leaf, alone[path], path)
        assert len(leaf.sharding.device_set) == 8, path
        sharded += not leaf.sharding.is_fully_replicated
    assert sharded > len(alone) / 2


def test_a_run_that_has_begun_reads_no_weights_again(done, monkeypatch):
    config, trained = done
    monkeypatch.setattr(api, "load_slices", None)
    again = api.run(config)
    for path, leaf in flatten(again.params).items():
        np.testing.assert_array_equal(leaf, flatten(trained.params)[path], path)


def test_another_models_weights_are_refused(text, tmp_path):
    folder, _ = text
    narrow = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, mlp_dim=96))
    for start, model in ((folder, narrow), ("tiny-vision", MODEL), ("tiny-vision", TINY_TEXT)):
        with pytest.raises(InputError, match="neither the model of the config nor the text model"):
            beginning(run_config(tmp_path, start, model))
