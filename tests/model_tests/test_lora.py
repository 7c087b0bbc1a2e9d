"""LoRA beside every projection: what PEFT computes, what merged weights compute, on any mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.checkpoint import hugging_face, peft
from l32jax.checkpoint.adapters import merged, own
from l32jax.checkpoint.engine.slices import Slices, load
from l32jax.checkpoint.engine.transfer import write
from l32jax.config import LlamaConfig, LoraConfig, MeshConfig
from l32jax.data.batches import place
from l32jax.errors import InputError
from l32jax.kernels.context import row_order
from l32jax.model.llama import batch_logits, bind, init_params
from l32jax.model.parameters import combine, flatten, is_lora, partition
from l32jax.sharding import CONTEXT_AXIS, make_mesh, single_device_mesh
from l32jax.train.objectives import cross_entropy
from tests import golden
from tests.checkpoint_tests.weights import random_params, targets
from tests.train_tests.small import LENGTH, MODEL, TEXT, rows

LORA = LoraConfig(rank=3, alpha=6.0)
LIMIT = 1e-5
MESHES = {
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, context=1, tensor=2),
    "fsdp2_context2_tensor2": MeshConfig(fsdp=2, context=2, tensor=2),
}


def with_lora(config: LlamaConfig, lora: LoraConfig = LORA) -> LlamaConfig:
    """In the decoder, and in the image encoder if there is one."""
    return dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, lora=lora),
        vision=config.vision and dataclasses.replace(config.vision, lora=lora),
    )


MODELS = {"text": with_lora(TEXT), "vision": with_lora(MODEL)}


def scores(config, params, mesh, *, images: bool) -> np.ndarray:
    """In the order of the rows, which devices along the context axis change."""
    with jax.set_mesh(mesh):
        batch = place(rows(8, images=images), mesh)
        model = partial(bind, config)
        found = jax.jit(lambda params, batch: batch_logits(model(params), batch, dtype=jnp.float32))
        logits = np.asarray(found(params, batch))
    return logits[:, row_order(LENGTH, mesh.shape[CONTEXT_AXIS])]


def base_of(params, config):
    """Without its LoRA."""
    return load(own(Slices.of(params), config)[0], targets(config.without_lora()))


@pytest.fixture(scope="module")
def alone():
    mesh = single_device_mesh()
    return {
        name: scores(config, random_params(config, mesh), mesh, images=name == "vision")
        for name, config in MODELS.items()
    }


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_mesh_computes_the_same(name, mesh, alone):
    spread = make_mesh(MESHES[mesh])
    params = random_params(MODELS[name], spread)
    found = scores(MODELS[name], params, spread, images=name == "vision")
    np.testing.assert_allclose(found, alone[name], rtol=0, atol=LIMIT)


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_score_the_same(name, alone):
    config, mesh = MODELS[name], single_device_mesh()
    params = random_params(config, mesh)
    base = config.without_lora()
    whole = load(merged(*own(Slices.of(params), config)), targets(base, mesh))
    found = scores(base, whole, mesh, images=name == "vision")
    np.testing.assert_allclose(found, alone[name], rtol=0, atol=LIMIT)
    apart = scores(base, base_of(params, config), mesh, images=name == "vision")
    assert np.abs(apart - alone[name]).max() > 0.05


@pytest.fixture(scope="module")
def fresh():
    """As a stage begins."""
    with jax.set_mesh(single_device_mesh()):
        return jax.jit(lambda: init_params(MODELS["vision"], jax.random.key(0)))()


def test_untouched_lora_is_the_identity(fresh):
    config, mesh = MODELS["vision"], single_device_mesh()
    before = scores(config.without_lora(), base_of(fresh, config), mesh, images=True)
    np.testing.assert_array_equal(scores(config, fresh, mesh, images=True), before)


def test_lora_a_begins_as_pefts_does(fresh):
    """Uniform up to the root of the number of inputs."""
    for path, leaf in flatten(fresh).items():
        if path.endswith("/lora_a"):
            inputs = np.prod(leaf.shape[2:])
            assert 0.8 < np.abs(leaf).max() * np.sqrt(inputs) <= 1, path
        if path.endswith("/lora_b"):
            assert not leaf.any(), path


def test_only_targets_are_adapted():
    config = with_lora(MODEL, LoraConfig(targets=("query", "down")))
    adapted = {path.split("/")[-2] for path in flatten(targets(config)) if is_lora(path)}
    assert adapted == {"query", "down"}


def test_a_lora_that_no_file_could_hold_is_refused():
    encoder = dataclasses.replace(MODEL.vision, lora=LoraConfig(rank=5))
    with pytest.raises(InputError, match="have one rank and one alpha"):
        dataclasses.replace(MODELS["vision"], vision=encoder)
    for fields in ({"rank": 0}, {"alpha": float("nan")}, {"targets": ()}):
        with pytest.raises(InputError, match="must"):
            LoraConfig(**fields)


HUGGING = with_lora(golden.TEXT, LoraConfig(rank=4, alpha=10.0))
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)


class Adapted:
    """One model with its adapter as ours, and as transformers and PEFT load what we write of it."""

    def __init__(self, folder):
        torch = pytest.importorskip("torch")
        library, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
        self.params = random_params(HUGGING)
        base, adapter = own(Slices.of(self.params), HUGGING)
        config = HUGGING.without_lora()
        ids = hugging_face.TokenIds(begin=1, stop=(2,), pad=None)
        write(hugging_face.plan(base, config, ids=ids, about={}), folder / "base")
        write(peft.plan(adapter, config, about={}), folder / "adapter")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype="float32", attn_implementation="eager"
        )
        self.theirs = library.PeftModel.from_pretrained(
            loaded, folder / "adapter", is_trainable=True
        ).eval()
        self.tokens = torch.from_numpy(TOKENS).long()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("peft"))


def test_logits_are_those_of_peft(adapted):
    ours = golden.logits(HUGGING, adapted.params, TOKENS)
    theirs = adapted.theirs(input_ids=adapted.tokens).logits.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT)
    with adapted.theirs.disable_adapter():
        base = adapted.theirs(input_ids=adapted.tokens).logits.detach().numpy()
    assert np.abs(base - theirs).max() > 0.1


def test_gradients_of_adapters_are_those_of_peft(adapted):
    theirs = adapted.theirs
    theirs.zero_grad()
    theirs(input_ids=adapted.tokens, labels=adapted.tokens).loss.backward()
    grads = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    table = peft._table(peft._linears(HUGGING.without_lora()))
    parts = {part.theirs: part for part in table if part.ours in flatten(adapted.params)}
    assert parts.keys() == grads.keys()
    assert len(grads) == 2 * 7 * HUGGING.decoder.num_layers
    ours = gradients(adapted.params)
    for name, part in parts.items():
        mine = np.asarray(ours[part.ours][part.layer])
        found = part.layout.read(grads[name], mine.shape)
        np.testing.assert_allclose(mine, found, rtol=1e-4, atol=1e-6, err_msg=name)


def gradients(params) -> dict[str, np.ndarray]:
    """Of the adapters, by the mean loss of the next token."""
    lora, rest = partition(params, is_lora)

    def loss(lora):
        model = bind(HUGGING, combine(lora, rest))
        index = np.tile(np.arange(TOKENS.shape[1], dtype=np.int32), (len(TOKENS), 1))
        batch = {
            "tokens": jnp.asarray(TOKENS),
            "positions": jnp.asarray(index),
            "start": jnp.zeros_like(index),
            "stop": jnp.asarray(index + 1),
        }
        scores = batch_logits(model, batch)
        return cross_entropy(scores[:, :-1], jnp.asarray(TOKENS[:, 1:])).mean()

    with jax.set_mesh(single_device_mesh()):
        return flatten(jax.jit(jax.grad(loss))(lora))
