"""What is told of the inside is what is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from l32jax.config import MeshConfig
from l32jax.data.batches import place
from l32jax.model import llama
from l32jax.model.inspect import QUERIES_AT_ONCE, Looks, cross_attention_weights, look
from l32jax.model.parameters import flatten
from l32jax.run_config import TrainConfig
from l32jax.sharding import make_mesh, single_device_mesh
from l32jax.train import examples, inside
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import LENGTH, MODEL, rows, stage

ROWS = 4
CONFIG = TrainConfig(model=MODEL, stages=(stage(("adapter",)),), directory="nowhere")
VISION = MODEL.vision
assert VISION is not None


def params_with_open_gates(mesh: Mesh | None = None):
    def opened(path, leaf):
        return leaf * 0 + 0.3 + 0.1 * np.arange(len(leaf)) if "_gate" in str(path[-1]) else leaf

    params = random_params(MODEL, mesh)
    decoder = jax.tree.map_with_path(opened, params["decoder"])
    return params | {"decoder": decoder}


@pytest.fixture(scope="module")
def expected():
    """From every weight, by numpy: what the looks should be, and the likeliest tokens."""
    batch = rows(ROWS, images=True)

    @jax.jit
    def run(params, batch):
        model = llama.bind(MODEL, params)
        scores = model.decoder.logits(llama.forward_batch(model, batch).states)
        return cross_attention_weights(model, batch), scores.argmax(-1)

    with jax.set_mesh(single_device_mesh()):
        weights, likeliest = jax.device_get(run(params_with_open_gates(), placed(batch)))
    per_tile = VISION.tokens_per_tile
    start, stop = batch["vision_start"], batch["vision_stop"]
    looking = stop > start
    tiles = weights.reshape(*weights.shape[:-1], -1, per_tile)

    def mean(values, where):
        return values.transpose(0, 1, 3, 2)[:, where].mean(axis=(1, 2))

    def entropy(parts):
        return -(parts * np.log(np.where(parts > 0, parts, 1))).sum(-1)

    seen = np.maximum(stop - start, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_token = entropy(weights) / np.log(seen)[:, None]
        by_tile = entropy(tiles.sum(-1)) / np.log(seen // per_tile)[:, None]
    return {
        "class_share": mean(tiles[..., 0].sum(-1), looking),
        "token_spread": mean(by_token, looking),
        "tile_spread": mean(by_tile, stop - start > per_tile),
    }, likeliest


def placed(batch):
    return place(batch, single_device_mesh())


def test_a_probe_sees_what_is_there_on_a_mesh(expected):
    looks, likeliest = expected
    devices = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    batch = rows(ROWS, images=True)
    looked = examples.looking_places(batch, inside.PLACES)
    asked = np.full_like(looked, -1)
    asked[:, :LENGTH] = np.arange(LENGTH)
    with jax.set_mesh(devices):
        probe = inside.make_probe(CONFIG, devices)
        found = probe(params_with_open_gates(devices), place(batch, devices), looked, asked)
    for name, values in looks.items():
        np.testing.assert_allclose(getattr(found.looks, name), values, rtol=1e-4)
    np.testing.assert_array_equal(found.likeliest[:, :LENGTH], likeliest)


def test_the_share_of_the_stream_grows_with_the_gate():
    """Nothing with a closed gate; then as the gate's tanh, in the first layer that looks."""
    batch = rows(ROWS, images=True)
    places = examples.looking_places(batch, QUERIES_AT_ONCE)

    def shares(gate: float) -> np.ndarray:
        with jax.set_mesh(single_device_mesh()):
            params = params_with_open_gates()
            for block in params["decoder"]["groups"]["blocks"].values():
                if "attention_gate" in block:
                    block["attention_gate"] = jnp.full_like(block["attention_gate"], gate)
            return np.asarray(looks_of(params, placed(batch), places).residual_share)

    assert np.all(shares(0.0) == 0)
    np.testing.assert_allclose(
        shares(0.8)[0] / shares(0.2)[0], np.tanh(0.8) / np.tanh(0.2), rtol=1e-5
    )


@jax.jit
def looks_of(params, batch, places) -> Looks:
    return look(llama.bind(MODEL, params), batch, places)[0]


def test_where_nobody_looks_nothing_is_told():
    alone = rows(1, images=True)
    batch = {name: array.repeat(ROWS, axis=0) for name, array in alone.items()}  # compiled already
    assert not np.any(batch["vision_stop"])
    with jax.set_mesh(single_device_mesh()):
        places = examples.looking_places(batch, QUERIES_AT_ONCE)
        assert np.all(places == -1)
        looks = jax.device_get(looks_of(params_with_open_gates(), placed(batch), places))
    assert inside.look_scalars(looks, MODEL.decoder) == {}


def test_no_row_of_weights_is_held_for_all_tokens():
    """Of a long row, the attention of a few tokens at a time exists."""
    batch = rows(1, images=True)
    places = np.zeros((1, 64), np.int32)
    with jax.set_mesh(single_device_mesh()):
        text = str(jax.make_jaxpr(looks_of)(params_with_open_gates(), placed(batch), places))
    keys = 4 * VISION.tokens_per_tile
    assert f",{QUERIES_AT_ONCE},{keys}]" in text
    assert f",64,{keys}]" not in text


def test_gates_have_the_names_of_their_layers():
    found = {"1/attention_gate": np.array([0.5, -0.25]), "1/mlp_gate": np.array([0.0, 1.0])}
    assert inside.gate_scalars(found, MODEL.decoder) == {
        "inside/attention_gate/1": 0.5,
        "inside/attention_gate/3": -0.25,
        "inside/mlp_gate/1": 0.0,
        "inside/mlp_gate/3": 1.0,
    }
    with jax.set_mesh(single_device_mesh()):
        gates = jax.device_get(inside.gates(params_with_open_gates()))
    assert gates.keys() == found.keys()
    np.testing.assert_allclose(gates["1/mlp_gate"], np.tanh([0.3, 0.4]), rtol=1e-6)


def test_norms_of_parts_make_up_the_whole():
    with jax.set_mesh(single_device_mesh()):
        params = params_with_open_gates()
    norms = jax.jit(inside.part_norms, static_argnums=1)(params, MODEL)
    assert set(norms) == {
        "grad_norm/language_model",
        "grad_norm/vision_tower",
        "grad_norm/adapter",
    }
    whole = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in flatten(params).values()))
    assert np.sqrt(sum(float(norm) ** 2 for norm in norms.values())) == pytest.approx(whole, 1e-5)
