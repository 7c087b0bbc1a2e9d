import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax import presets
from l32jax.checkpoint import meta
from l32jax.checkpoint.engine.slices import load
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import ROTARY_PAIRS, addresses, their_shapes
from l32jax.config import MeshConfig
from l32jax.errors import InputError
from l32jax.model.parameters import flatten
from l32jax.sharding import make_mesh, single_device_mesh
from tests import golden
from tests.checkpoint_tests.weights import targets, tensors_of

MODELS = {"llama_tiny_meta": golden.TEXT, "mllama_tiny_meta": golden.VISION}
Q0 = "text_model.layers.0.attention.wq.weight"


def weights(name: str) -> dict[str, np.ndarray]:
    return {k.removeprefix("w/"): v for k, v in golden.arrays(name).items() if k.startswith("w/")}


@pytest.fixture(scope="module")
def vision():
    return weights("mllama_tiny_meta")


def load_arrays(arrays, config=golden.VISION, **how):
    slices = meta.open_tensors(Source.of(arrays, "Meta's checkpoint"), config)
    return load(slices, targets(config, **how))


@pytest.mark.parametrize("name", MODELS)
def test_every_mesh_gives_back_every_bit(name):
    theirs, config = weights(name), MODELS[name]
    meshes = single_device_mesh(), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for mesh in meshes:
        wanted = targets(config, mesh)
        ours = load_arrays(theirs, config, mesh=mesh)
        shardings = jax.tree.map(
            lambda leaf, target: leaf.sharding == target.sharding, ours, wanted
        )
        assert all(jax.tree.leaves(shardings))
        back = tensors_of(meta.table(config), ours)
        assert back.keys() == theirs.keys()
        for key, array in theirs.items():
            np.testing.assert_array_equal(back[key], array, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_table_covers_each_parameter_and_tensor_once(name):
    config = MODELS[name]
    shapes = {path: leaf.shape for path, leaf in flatten(targets(config)).items()}
    table = meta.table(config)
    assert len({part.theirs for part in table}) == len(table)
    assert {part.ours for part in table} == shapes.keys()
    assert their_shapes(table, shapes) == {k: v.shape for k, v in weights(name).items()}


def test_decoder_layers_go_where_meta_runs_them(vision):
    """Cross-attention layer j runs before self-attention layer 4 j + 3 (counted apart)."""
    order = [(a.kind, a.ordinal) for a in addresses(golden.VISION.decoder)]
    assert order.index(("cross", 1)) + 1 == order.index(("self", 7))
    blocks = load_arrays(vision)["decoder"]["groups"]["blocks"]
    key = "text_model.{}.attention_norm.weight"
    for slot, layers in {0: (0, 4), 2: (2, 6), 4: (3, 7)}.items():
        for group, layer in enumerate(layers):
            expected = vision[key.format(f"layers.{layer}")]
            assert np.array_equal(blocks[slot]["attention_norm"]["scale"][group], expected)
    expected = vision[key.format("cross_attention_layers.1")]
    assert np.array_equal(blocks[3]["attention_norm"]["scale"][1], expected)


def test_only_rotated_queries_and_keys_are_permuted(vision):
    params = load_arrays(vision)
    blocks = params["decoder"]["groups"]["blocks"]
    prefix = "text_model.{}.attention.{}.weight"
    for slot, layer in ((0, "layers.4"), (3, "cross_attention_layers.1")):
        for ours, theirs in (("query", "wq"), ("key", "wk"), ("value", "wv")):
            weight = np.asarray(blocks[slot]["attention"][ours]["weight"][1])
            raw = vision[prefix.format(layer, theirs)].reshape(weight.shape)
            if slot == 0 and ours != "value":
                pairs = raw.reshape(raw.shape[0], -1, 2, raw.shape[-1])
                raw = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1)
            assert np.array_equal(weight, raw), (slot, ours)


@given(heads=st.integers(1, 9), half=st.integers(1, 9), width=st.integers(1, 4))
def test_rotary_permutation_is_undone_exactly(heads, half, width):
    shape = (heads, 2 * half, width)
    ours = np.arange(np.prod(shape)).reshape(shape)
    theirs = ROTARY_PAIRS.write(ours, ROTARY_PAIRS.their_shape(shape))
    assert np.array_equal(ROTARY_PAIRS.read(theirs, shape), ours)
    assert np.array_equal(theirs[0], ours[0, 0]) and np.array_equal(theirs[1], ours[0, half])


def test_loading_casts_to_the_targets_dtype(vision):
    params = load_arrays(vision, dtype=jnp.bfloat16)
    norm = params["vision"]["pre_norm"]["scale"]
    expected = vision["vision_model.vision_encoder.ln_pre.weight"].astype(jnp.bfloat16)
    assert norm.dtype == jnp.bfloat16 and np.array_equal(norm, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(Q0), rf"'{Q0}' is missing: decoder/groups/blocks/0/attention/query/"
         r"weight\[0\] needs it with shape \[64, 64\]"),
        (lambda w: w.update({"extra": np.zeros(3)}), r"'extra' of shape \[3\] has no place"),
        (lambda w: w.update({Q0: w[Q0][:32]}), r"has shape \[32, 64\]: decoder/.* \[64, 64\]"),
        (lambda w: [w.pop(name) for name in list(w)[:5]], r"\(and 4 more such problems\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_error_that_names_it(change, message, vision):
    changed = dict(vision)
    change(changed)
    with pytest.raises(InputError, match=message) as caught:
        load_arrays(changed)
    assert "\n" not in str(caught.value)


def test_rotary_table_in_a_checkpoint_is_not_needed(vision):
    load_arrays({**vision, "text_model.rope.freqs": np.zeros(8)})


def test_tied_head_may_be_stored_if_it_is_the_embedding():
    theirs = weights("llama_tiny_meta")
    tied = dataclasses.replace(golden.TEXT.decoder, tied_embedding=True)
    config = dataclasses.replace(golden.TEXT, decoder=tied)
    with pytest.raises(InputError, match="'output.weight' differs from 'tok_embeddings.weight'"):
        load_arrays(theirs, config)
    load_arrays(theirs | {"output.weight": theirs["tok_embeddings.weight"]}, config)
    del theirs["output.weight"]
    params = load_arrays(theirs, config)
    assert "output.weight" not in tensors_of(meta.table(config), params)


@pytest.mark.parametrize("name", ["llama3.2-11b-vision", "llama3.2-90b-vision"])
def test_big_tables_have_metas_shapes(name):
    """Shapes alone, without any weights: the first and last of each kind of layer."""
    config = presets.preset(name)
    shapes = {path: leaf.shape for path, leaf in flatten(targets(config)).items()}
    theirs = their_shapes(meta.table(config), shapes)
    last = {"llama3.2-11b-vision": (31, 7), "llama3.2-90b-vision": (79, 19)}[name]
    assert f"text_model.layers.{last[0]}.attention.wq.weight" in theirs
    assert f"text_model.layers.{last[0] + 1}.attention.wq.weight" not in theirs
    assert f"text_model.cross_attention_layers.{last[1]}.gate_ffwd" in theirs
    assert f"text_model.cross_attention_layers.{last[1] + 1}.gate_ffwd" not in theirs
    counted = {"llama3.2-11b-vision": 10_616_650_275, "llama3.2-90b-vision": 88_552_318_523}
    assert sum(int(np.prod(shape)) for shape in theirs.values()) == counted[name]
