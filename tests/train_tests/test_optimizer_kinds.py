"""Adafactor and Muon: which dimensions they take for a matrix, what they keep, on any mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.config import MeshConfig
from l32jax.model.llama import abstract_params, shapes_of
from l32jax.model.matrices import is_projection, matrix_dims
from l32jax.model.parameters import flatten
from l32jax.presets import LLAMA3_2_11B_VISION
from l32jax.run_config import OptimizerConfig
from l32jax.sharding import make_mesh, single_device_mesh
from l32jax.train.optimizer import make_optimizer
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import MODEL

KINDS = ("adamw", "adafactor", "muon")
LEAN = {"kind": "adafactor", "beta1": 0.0}
MESH = MeshConfig(data=1, fsdp=2, context=2, tensor=2)


def optimizer(**settings):
    return make_optimizer(OptimizerConfig(**({"peak_lr": 1.0, "weight_decay": 0.0} | settings)))


def some_params(mesh=None):
    """Of each kind one or two, as each shape is compiled by itself."""
    params = random_params(MODEL, mesh)
    cross = params["decoder"]["groups"]["blocks"][1]
    attention = {name: cross["attention"][name] for name in ("query", "out", "query_norm")}
    block = cross | {"attention": attention, "mlp": {"down": cross["mlp"]["down"]}}
    return {
        "decoder": {
            "embedding": params["decoder"]["embedding"],
            "groups": {"blocks": {1: block}},
        },
        "projector": params["projector"],
        "vision": {
            name: params["vision"][name] for name in ("position", "pre_norm", "class_embedding")
        },
    }


def grads_like(params):
    """Of several sizes: one a parameter."""
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    made = [
        jax.device_put(
            (random.standard_normal(leaf.shape) * 10.0 ** (number % 5 - 2)).astype(np.float32),
            leaf.sharding,
        )
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)


def updated(made, params, grads, steps: int = 1):
    @jax.jit
    def update(grads, params):
        state = made.init(params)
        for _ in range(steps):
            updates, state = made.update(grads, state, params)
        return updates, state

    return update(grads, params)


@pytest.fixture(scope="module")
def alone():
    with jax.set_mesh(single_device_mesh()):
        params = some_params()
        yield params, grads_like(params)


@pytest.mark.parametrize(
    ("path", "rows", "columns"),
    [
        ("decoder/groups/blocks/0/attention/query/weight", (1, 2), (3,)),
        ("decoder/groups/blocks/0/attention/out/weight", (1,), (2, 3)),
        ("decoder/groups/blocks/0/mlp/down/weight", (1,), (2,)),
        ("vision/local_blocks/attention/value/weight", (1, 2), (3,)),
        ("vision/patch_embedding/weight", (0,), (1,)),
        ("projector/weight", (0,), (1,)),
        ("decoder/embedding/weight", (0,), (1,)),
        ("vision/position/tile_embedding", (0, 1, 2), (3,)),
    ],
)
def test_rows_are_what_goes_out_and_columns_what_comes_in(path, rows, columns):
    assert matrix_dims(path, len(shapes_of(LLAMA3_2_11B_VISION)[path])) == (rows, columns)


def test_scales_biases_and_gates_are_no_matrices():
    shapes = shapes_of(MODEL)
    for path, shape in shapes.items():
        is_matrix = matrix_dims(path, len(shape)) is not None
        assert is_matrix == (
            path.endswith(("weight", "/embedding", "_embedding"))
            and path != "vision/class_embedding"
        ), path
    left_out = {p for p in shapes if p.endswith("/weight") and not is_projection(p)}
    assert left_out == {"decoder/embedding/weight", "decoder/image_embedding/weight"}


def bytes_of_state(config, **settings) -> dict[str, int]:
    """By the path of the parameter, without its scalars."""
    with jax.set_mesh(single_device_mesh()):
        params = abstract_params(config)
        state = jax.eval_shape(optimizer(**settings).init, params)
    named = flatten(state)
    return {
        path: sum(
            leaf.size * leaf.dtype.itemsize for name, leaf in named.items() if name.endswith(path)
        )
        for path in flatten(params)
    }


def test_adafactor_keeps_less_than_a_twentieth_of_adamws_state_for_matrices():
    whole, lean = bytes_of_state(LLAMA3_2_11B_VISION), bytes_of_state(LLAMA3_2_11B_VISION, **LEAN)
    with_momentum = bytes_of_state(LLAMA3_2_11B_VISION, kind="adafactor", momentum="bfloat16")
    matrices = [path for path in whole if path.endswith("/weight") and "image_emb" not in path]
    assert all(lean[path] < 0.05 * whole[path] for path in matrices)
    assert sum(lean.values()) < 0.001 * sum(whole.values())
    assert sum(with_momentum.values()) < 0.252 * sum(whole.values())


def test_adafactor_divides_each_layer_by_the_root_of_its_own_factors(alone):
    params, grads = alone
    updates, _ = updated(optimizer(clip_norm=1e9, beta2=0.9, **LEAN), params, grads, steps=3)
    for path, update in flatten(updates).items():
        grad = np.asarray(flatten(grads)[path], np.float64)
        np.testing.assert_allclose(update, -by_hand(path, grad), rtol=2e-5, err_msg=path)


def by_hand(path: str, grad):
    """With equal gradients each step, moments corrected for their start are the squares."""
    layers = grad if "blocks" in path else grad[None]
    made = []
    for layer in layers:
        dims = matrix_dims(path.replace("blocks", "layer"), layer.ndim)
        second = layer**2
        if dims is not None:
            matrix = second.reshape(np.prod([layer.shape[d] for d in dims.rows]), -1)
            rows, columns = matrix.mean(1), matrix.mean(0)
            second = (np.outer(rows, columns) / rows.mean()).reshape(layer.shape)
        update = layer / (np.sqrt(second) + 1e-8)
        made.append(update / max(np.sqrt((update**2).mean()), 1))
    return np.stack(made) if "blocks" in path else made[0]


def test_a_matrix_without_gradients_stays(alone):
    params, _ = alone
    nothing = jax.tree.map(jnp.zeros_like, params)
    for kind in KINDS:
        updates, _ = updated(optimizer(kind=kind), params, nothing)
        assert not any(np.asarray(update).any() for update in flatten(updates).values()), kind


def test_muon_makes_each_layers_matrix_orthogonal_and_leaves_the_rest_to_adamw(alone):
    params, grads = alone
    adamw, _ = updated(optimizer(), params, grads)
    muon, _ = updated(optimizer(kind="muon"), params, grads)
    adamw, muon = flatten(adamw), flatten(muon)
    for path, update in muon.items():
        if not is_projection(path):
            np.testing.assert_array_equal(update, adamw[path], err_msg=path)
            continue
        dims = matrix_dims(path, update.ndim)
        layers = np.asarray(update) if dims.rows[0] else np.asarray(update)[None]
        for layer in layers:
            rows = np.prod(update.shape[dims.rows[0] : dims.columns[0]])
            sizes = np.linalg.svd(layer.reshape(rows, -1), compute_uv=False)
            # Five Newton-Schulz steps bring all but the smallest about as far.
            assert sizes.max() < 2.5 * np.quantile(sizes, 0.1), path
            assert 0.1 < np.sqrt((layer**2).mean()) < 0.3, path  # AdamW's size


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_and_the_gates_own_rate_are_the_same_for_all(kind, alone):
    params, grads = alone
    plain = flatten(updated(optimizer(kind=kind), params, grads)[0])
    other = optimizer(kind=kind, weight_decay=0.25, gate_rate=30.0)
    for path, update in flatten(updated(other, params, grads)[0]).items():
        expected = plain[path] * (30 if path.endswith("gate") else 1)
        if path.endswith("/weight"):
            expected = expected - 0.25 * flatten(params)[path]
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("settings", [LEAN, {"kind": "adafactor"}, {"kind": "muon"}])
def test_a_mesh_keeps_shardings_and_gives_the_same(settings, alone):
    expected = flatten(updated(optimizer(**settings), *alone)[0])
    mesh = make_mesh(MESH)
    with jax.set_mesh(mesh):
        params = some_params(mesh)
        grads = jax.tree.map(
            lambda grad, leaf: jax.device_put(np.asarray(grad), leaf.sharding), alone[1], params
        )
        found, state = updated(optimizer(**settings), params, grads)
    for path, update in flatten(found).items():
        np.testing.assert_allclose(update, expected[path], rtol=1e-3, atol=1e-4, err_msg=path)
        assert update.sharding.is_equivalent_to(flatten(params)[path].sharding, update.ndim), path
        for name, leaf in flatten(state).items():
            if name.endswith(path) and leaf.shape == update.shape:
                assert leaf.sharding.is_equivalent_to(update.sharding, leaf.ndim), name


def test_state_is_born_with_the_sharding_of_its_parameter():
    mesh = make_mesh(MESH)
    path = "decoder/groups/blocks/1/attention/query/weight"  # [l n h d]: d over fsdp, n over tensor
    with jax.set_mesh(mesh):
        init = partial(optimizer(**LEAN).init, some_params(mesh))
        state = flatten(jax.jit(init)())
    specs = {name: leaf.sharding.spec for name, leaf in state.items() if name.endswith(path)}
    assert {tuple(spec) for spec in specs.values()} == {(None, "tensor", None), (None, "fsdp")}
