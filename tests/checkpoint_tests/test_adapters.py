"""LoRA adapters: PEFT's folders and our own file, both ways, and merged into their model."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l32jax.checkpoint import hugging_face, peft
from l32jax.checkpoint.adapters import (
    FILE,
    Adapter,
    can_be_adapted,
    merged,
    open_ours,
    plan_ours,
    shapes,
)
from l32jax.checkpoint.engine.slices import Home, Slices
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import theirs
from l32jax.checkpoint.engine.transfer import write
from l32jax.checkpoint.peft import WEIGHTS, open_peft, plan
from l32jax.checkpoint.peft_config import BEYOND_LORA, CONFIG
from l32jax.errors import InputError
from l32jax.model.llama import shapes_of
from tests import golden
from tests.checkpoint_tests.weights import (
    export_hugging_face,
    random_params,
)

MODELS = {"text": golden.TEXT, "vision": golden.VISION}
TIED = dataclasses.replace(
    golden.TEXT, decoder=dataclasses.replace(golden.TEXT.decoder, tied_embedding=True)
)
IDS = hugging_face.TokenIds(begin=1, stop=(2,), pad=None)
ALL = slice(None)
TEXT_TABLE = hugging_face.table(golden.TEXT)


def adapter_of(config, *, weights=None, rank=4, scale=1.5, dtype=np.float32, seed=0) -> Adapter:
    """Random values; of all weights, if not of those."""
    model = shapes_of(config)
    weights = weights or [path for path in model if can_be_adapted(path)]
    random = np.random.default_rng(seed)
    arrays = {
        path: random.standard_normal(shape).astype(dtype)
        for path, shape in shapes(weights, model, rank).items()
    }
    return Adapter(slices_of(arrays), rank, scale)


def slices_of(arrays) -> Slices:
    """Of arrays under our paths."""
    tree: dict = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return Slices.of(tree)


def arrays_of(slices) -> dict[str, np.ndarray]:
    return {str(home): np.asarray(slices.read(home, ALL)) for home in slices.homes()}


def assert_equal(ours, theirs):
    """Bit by bit, dtypes included."""
    ours, theirs = arrays_of(ours), arrays_of(theirs)
    assert ours.keys() == theirs.keys()
    for home, array in ours.items():
        assert array.dtype == theirs[home].dtype, home
        np.testing.assert_array_equal(array, theirs[home], err_msg=home)


def saved(adapter, config, folder, base_model_name=None):
    write(plan(adapter, config, base_model_name=base_model_name, about={}), folder, {})
    return folder


@pytest.fixture(scope="module")
def params():
    return {name: random_params(config) for name, config in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_peft_folders_come_back_bit_by_bit(name, dtype, tmp_path):
    config = MODELS[name]
    adapter = adapter_of(config, dtype=dtype)
    again = open_peft(saved(adapter, config, tmp_path / "peft"), config)
    assert (again.rank, again.scale) == (4, 1.5)
    assert_equal(again.slices, adapter.slices)


@pytest.mark.parametrize("name", MODELS)
def test_our_file_comes_back_bit_by_bit_with_its_config(name, tmp_path):
    config, path = MODELS[name], tmp_path / "mine.safetensors"
    adapter = adapter_of(config, scale=math.sqrt(2))
    write(plan_ours(adapter, config, about={}), path, {})
    again, its_config = open_ours(path)
    assert (again.rank, again.scale, its_config) == (4, math.sqrt(2), config)
    assert_equal(again.slices, adapter.slices)
    arrays = safetensors.numpy.load_file(path)
    assert {name: array.shape for name, array in arrays.items()} == adapter.slices.shapes


@pytest.mark.parametrize("scale", [0.7, 2 / 3, math.pi, 16 / math.sqrt(7)])
def test_a_scale_is_kept_through_its_alpha(scale, tmp_path):
    adapter = adapter_of(golden.TEXT, weights=["decoder/head/weight"], rank=7, scale=scale)
    again = open_peft(saved(adapter, golden.TEXT, tmp_path / "peft"), golden.TEXT)
    assert again.scale == pytest.approx(scale, rel=1e-15)


def dense(weight, a, b, scale, outs):
    """In float64, of one layer; the number of dims that are outputs is given."""
    a, b = (np.asarray(array, np.float64) for array in (a, b))
    return np.asarray(weight, np.float64) + scale * np.tensordot(b, a, axes=(outs, 0))


@pytest.mark.parametrize("name", MODELS)
def test_merging_is_the_dense_sum_and_leaves_the_rest(name, params):
    base, adapter = Slices.of(params[name]), adapter_of(MODELS[name])
    result = merged(base, adapter)
    adapted = set(adapter.weights)
    assert any(path.startswith("vision/") for path in adapted) == (name == "vision")
    for home in base.homes():
        before, after = (np.asarray(slices.read(home, ALL)) for slices in (base, result))
        assert before.dtype == after.dtype
        if home.path not in adapted:
            np.testing.assert_array_equal(before, after)
            continue
        prefix = home.path.removesuffix("weight")
        a, b = (
            adapter.slices.read(Home(prefix + name, home.layer), ALL)
            for name in ("lora_a", "lora_b")
        )
        expected = dense(before, a, b, adapter.scale, b.ndim - 1)
        np.testing.assert_allclose(after, expected, rtol=0, atol=4e-6, err_msg=str(home))


def test_a_merged_weight_is_rounded_once(params):
    """Adding what is below half a unit in the last place of bfloat16 must leave the weight."""
    base = Slices.of(jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params["text"]))
    adapter = adapter_of(golden.TEXT)
    exact, rounded = merged(base.as_dtype(np.float32), adapter), merged(base, adapter)
    assert_equal(rounded, exact.as_dtype(jnp.bfloat16))


def test_rows_are_merged_alone(params, monkeypatch):
    monkeypatch.setattr("l32jax.checkpoint.adapters.BLOCK_BYTES", 3000)  # several blocks
    asked = []
    adapter = adapter_of(golden.TEXT)

    def read(home, rows):
        asked.append((home.path, rows))
        return adapter.slices.read(home, rows)

    watched = adapter._replace(slices=dataclasses.replace(adapter.slices, read=read))
    base = Slices.of(params["text"])
    home = Home("decoder/groups/blocks/0/mlp/up/weight", 1)
    some = merged(base, watched).read(home, slice(30, 90))
    whole = merged(base, adapter).read(home, ALL)
    np.testing.assert_allclose(some, whole[30:90], rtol=0, atol=2e-6)
    assert ("decoder/groups/blocks/0/mlp/up/lora_b", slice(30, 90)) in asked


def test_an_adapter_of_another_model_is_refused(params, tmp_path):
    small = dataclasses.replace(
        golden.TEXT, decoder=dataclasses.replace(golden.TEXT.decoder, num_groups=2)
    )
    adapter = adapter_of(golden.TEXT)
    with pytest.raises(InputError, match="'decoder/groups/blocks/0/attention/key/lora_a' is of sh"):
        merged(Slices.of(random_params(small)), adapter)
    folder = saved(adapter, golden.TEXT, tmp_path / "peft")
    with pytest.raises(InputError, match="'model.layers.2.self_attn.q_proj' has no place"):
        open_peft(folder, small)
    wide = dataclasses.replace(
        golden.TEXT, decoder=dataclasses.replace(golden.TEXT.decoder, mlp_dim=128)
    )
    with pytest.raises(InputError, match=r"mlp.gate_proj.lora_B.weight'.*\[256, 4\].*\[128, 4\]"):
        open_peft(folder, wide)
    with pytest.raises(InputError, match="'lm_head', which in this model is the embedding; untie"):
        open_peft(folder, TIED)


# What others write: settings and tensors by hand.


def by_hand(folder, arrays, **content):
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **content}
    (folder / CONFIG).write_text(json.dumps(settings))
    safetensors.numpy.save_file(arrays, folder / WEIGHTS)
    return folder


def module_arrays(module, ins, outs, rank=4, seed=0):
    random = np.random.default_rng([seed, len(module)])
    return {
        f"base_model.model.{module}.lora_A.weight": random.standard_normal((rank, ins), np.float32),
        f"base_model.model.{module}.lora_B.weight": random.standard_normal(
            (outs, rank), np.float32
        ),
    }


def test_layers_ranks_and_scales_of_their_own_are_kept(params, tmp_path):
    """Layer 1 has no adapter of its queries; ranks and alphas follow patterns, the first wins."""
    sizes = {  # module: ins, outs, rank, alpha
        "model.layers.0.self_attn.q_proj": (64, 64, 4, 8),
        "model.layers.2.self_attn.q_proj": (64, 64, 6, 5),
        "model.layers.1.self_attn.o_proj": (64, 64, 4, 8),
        "model.layers.0.mlp.down_proj": (256, 64, 2, 3),
        "lm_head": (64, 256, 4, 8),
    }
    arrays = {}
    for module, (ins, outs, rank, _) in sizes.items():
        arrays |= module_arrays(module, ins, outs, rank)
    folder = by_hand(
        tmp_path / "peft",
        arrays,
        use_rslora=True,
        layers_to_transform=[0, 1, 2],
        rank_pattern={"^model.layers.2.self_attn.q_proj": 6, "down_proj": 2},
        alpha_pattern={"layers\\.2\\..*q_proj": 5, "q_proj": 8, "mlp.(down|up)_proj": 3},
    )
    adapter = open_peft(folder, golden.TEXT)
    assert adapter.rank == 6 and adapter.scale == 8 / math.sqrt(4)
    base = Slices.of(params["text"])
    before, after = theirs(TEXT_TABLE, base), theirs(TEXT_TABLE, merged(base, adapter))
    for name in before.tensors:
        expected, module = before.read(name, ALL).astype(np.float64), name.removesuffix(".weight")
        found = after.read(name, ALL)
        if module in sizes:
            *_, rank, alpha = sizes[module]
            a, b = (arrays[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
            expected += alpha / math.sqrt(rank) * (b.astype(np.float64) @ a)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_names_of_each_release_are_read(tmp_path):
    """In memory since transformers 4.52, on disk and in memory before; and with PEFT's default."""
    adapter = adapter_of(golden.VISION)
    folder = saved(adapter, golden.VISION, tmp_path / "peft")
    arrays = safetensors.numpy.load_file(folder / WEIGHTS)
    before = {
        name.replace("model.model.language_model.", "model.language_model.model.")
        .replace("model.model.vision_model.", "model.vision_model.")
        .replace("model.model.multi_modal", "model.multi_modal")
        .replace("model.lm_head", "model.language_model.lm_head")
        .replace("lora_A.weight", "lora_A.default.weight"): array
        for name, array in arrays.items()
    }
    assert not before.keys() & arrays.keys() - {n for n in arrays if n.endswith("lora_B.weight")}
    old = open_peft(by_hand(tmp_path / "old", before, lora_alpha=6), golden.VISION)
    assert (old.rank, old.scale) == (adapter.rank, adapter.scale)
    assert_equal(old.slices, adapter.slices)


def test_the_frozen_head_that_peft_saves_beside_is_no_adapter(tmp_path):
    arrays = module_arrays("lm_head", 64, 256)
    frozen = {"base_model.model.lm_head.base_layer.weight": np.ones((256, 64), np.float32)}
    adapter = open_peft(by_hand(tmp_path / "peft", arrays | frozen), golden.TEXT)
    assert adapter.weights == ["decoder/head/weight"]


def test_target_modules_are_what_is_adapted_and_no_more(tmp_path):
    """q_proj would name the image encoder's and the cross-attention's queries too."""
    blocks = "decoder/groups/blocks"
    weights = [f"{blocks}/3/attention/query/weight", f"{blocks}/0/mlp/up/weight"]
    adapter = adapter_of(golden.VISION, weights=[*weights, "vision/local_blocks/mlp/up/weight"])
    folder = saved(adapter, golden.VISION, tmp_path / "peft")
    targets = json.loads((folder / CONFIG).read_text())["target_modules"]
    assert "cross_attn.q_proj" in targets and "q_proj" not in targets
    modules = [peft._module(part) for part in peft._linears(golden.VISION)]
    chosen = {m for m in modules if any(m == t or m.endswith(f".{t}") for t in targets)}
    names = safetensors.numpy.load_file(folder / WEIGHTS)
    assert chosen == {name.removeprefix(peft.PREFIX).split(".lora_")[0] for name in names}


HARMLESS = {
    "peft_version": "9.9",
    "target_modules": ["q_proj"],
    "lora_dropout": 0.1,
    "qalora_group_size": 16,
    "init_lora_weights": "gaussian",
    "enable_lora": None,
    "merge_weights": False,
    "loftq_config": {},
    "use_dora": False,
    "brand_new": [],
}
QUERY = module_arrays("model.layers.0.self_attn.q_proj", 64, 64)


def test_settings_that_change_nothing_are_read(tmp_path):
    assert open_peft(by_hand(tmp_path / "peft", QUERY, **HARMLESS), golden.TEXT).scale == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *[({name: ["x"]}, f"'{name}' is \\['x'\\], but only plain LoRA") for name in BEYOND_LORA],
        ({"peft_type": "LOHA"}, "'peft_type' .* it is 'LOHA', expected 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'init_lora_weights' .* 'pissa_niter_4'"),
        ({"init_lora_weights": "lora_ga"}, "'init_lora_weights' .* 'lora_ga'"),
        ({"brand_new": True}, "'brand_new' .* unknown here"),
        ({"r": 8}, r"lora_A.weight' .* its rank is 4, adapter_config.json says 8"),
        ({"r": 10**9}, "'r' .* an integer between 1 and 4096"),
        ({"lora_alpha": "8"}, "'lora_alpha' .* a positive number"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "only simple patterns are read"),
        ({"alpha_pattern": {"[": 4}}, "no regular expression"),
        ({"alpha_pattern": {str(i): 4 for i in range(2000)}}, "at most 1024 patterns"),
        ({"alpha_pattern": ["q_proj"]}, "expected a JSON object"),
    ],
)
def test_more_than_lora_is_refused_by_its_settings(content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_peft(by_hand(tmp_path / "peft", QUERY, **content), golden.TEXT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.embed_tokens.lora_embedding_A", "more than LoRA of linear layers"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "more than LoRA"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "more than LoRA"),
        ("model.layers.0.self_attn.q_proj.bias", "more than LoRA"),
        ("lm_head.weight", "more than LoRA"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "more than LoRA"),
        ("model.layers.0.self_attn.k_proj.lora_A.weight", "k_proj' has lora_A alone"),
        ("model.layers.9.self_attn.q_proj.lora_A.weight", "q_proj' has no place"),
        ("model.embed_tokens.lora_A.weight", "embed_tokens' has no place"),
    ],
)
def test_more_than_lora_is_refused_by_its_tensors(name, message, tmp_path):
    more = {f"base_model.model.{name}": np.ones((4, 64), np.float32)}
    with pytest.raises(InputError, match=message):
        open_peft(by_hand(tmp_path / "peft", QUERY | more), golden.TEXT)


def test_folders_without_safetensors_or_adapters_are_refused(tmp_path):
    folder = by_hand(tmp_path / "peft", {})
    with pytest.raises(InputError, match="it has no LoRA tensors"):
        open_peft(folder, golden.TEXT)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="only safetensors are read"):
        open_peft(folder, golden.TEXT)
    (folder / WEIGHTS).symlink_to(saved(adapter_of(TIED), TIED, tmp_path / "x") / WEIGHTS)
    with pytest.raises(InputError, match="links to .* outside of it"):
        open_peft(folder, golden.TEXT)


def test_our_file_is_refused_if_it_is_none_or_lies(tmp_path):
    path = tmp_path / "mine.safetensors"
    write(plan_ours(adapter_of(golden.TEXT), golden.TEXT, about={}), path, {})
    arrays = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        ((key, text),) = file.metadata().items()

    def refused(message, arrays=arrays, **metadata):
        safetensors.numpy.save_file(arrays, path, {key: json.dumps(json.loads(text) | metadata)})
        with pytest.raises(InputError, match=message):
            open_ours(path)

    refused("'rank' .* expected an integer", rank=0)
    refused("lora_a' is of shape .* and of shape .* for its own config", rank=5)
    refused("'scale' .* expected a positive number", scale=None)
    refused("'more' .* unknown here", more=1)
    refused("is a NoneType", config=None)
    first, *_ = sorted(arrays)
    refused("is absent, and of shape", {name: arrays[name] for name in arrays if name != first})
    refused("'nowhere' is of shape .* and absent", {**arrays, "nowhere": np.ones(3, np.float32)})
    swapped = {**arrays, first: np.swapaxes(arrays[first], 0, 1).copy()}
    refused("is of shape", swapped)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(InputError, match="no adapter of ours"):
        open_ours(path)
    assert FILE.endswith(".safetensors")


# Modules of the tiny text model: their name's end, ins, outs.
MODULES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.up_proj": (64, 256),
    "mlp.down_proj": (256, 64),
}
chosen = st.dictionaries(
    st.tuples(st.sampled_from(sorted(MODULES)), st.integers(0, 2)),
    st.tuples(st.integers(1, 5), st.sampled_from([1, 3, 8, 2.5])),
    min_size=1,
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chosen=chosen, rslora=st.booleans())
def test_what_is_read_and_written_again_merges_alike(chosen, rslora, params, tmp_path_factory):
    """Whatever modules, layers, ranks and alphas an adapter has."""
    home = tmp_path_factory.mktemp("any")
    arrays, ranks, alphas = {}, {}, {}
    for (kind, layer), (rank, alpha) in chosen.items():
        module = f"model.layers.{layer}.{kind}"
        arrays |= module_arrays(module, *MODULES[kind], rank)
        ranks[f"^{module}"], alphas[f"^{module}"] = rank, alpha
    content = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    first = open_peft(by_hand(home / "theirs", arrays, **content), golden.TEXT)
    again = open_peft(saved(first, golden.TEXT, home / "ours"), golden.TEXT)
    base = Slices.of(params["text"])
    assert_equal(merged(base, again), merged(base, first))
    before, after = theirs(TEXT_TABLE, base), theirs(TEXT_TABLE, merged(base, again))
    for (kind, layer), (rank, alpha) in chosen.items():
        name = f"model.layers.{layer}.{kind}"
        a, b = (arrays[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        expected = before.read(f"{name}.weight", ALL) + scale * (b.astype(np.float64) @ a)
        found = after.read(f"{name}.weight", ALL)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * (1 + abs(expected).max()))


# PEFT itself, where it is installed.


@pytest.fixture(scope="module")
def bases(params, tmp_path_factory):
    """A function that loads a base in transformers, and the library PEFT."""
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    kinds = {
        "text": transformers.LlamaForCausalLM,
        "vision": transformers.MllamaForConditionalGeneration,
    }
    home = tmp_path_factory.mktemp("bases")
    for name, config in MODELS.items():
        export_hugging_face(params[name], config, home / name, dtype=np.float32, ids=IDS)

    def load(name, folder=None):
        how = {"dtype": "float32", "attn_implementation": "eager"}
        return kinds[name].from_pretrained(folder or home / name, **how).eval()

    return load, library


def logits_of(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25)[None]).logits.numpy()


def assert_merged_alike(adapted, slices, config):
    """Every weight, so those of the image encoder too."""
    state = adapted.merge_and_unload().state_dict()
    source = Source.of({name: tensor.numpy() for name, tensor in state.items()}, "memory")
    theirs = arrays_of(hugging_face.open_tensors(source, config))
    for home, array in arrays_of(slices).items():
        np.testing.assert_allclose(array, theirs[home], rtol=0, atol=4e-6, err_msg=home)


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_from_our_folder_what_the_merged_model_computes(
    name, params, bases, tmp_path, recwarn
):
    load, library = bases
    config, adapter = MODELS[name], adapter_of(MODELS[name], scale=0.02)
    folder = saved(adapter, config, tmp_path / "peft", base_model_name="base")
    adapted = library.PeftModel.from_pretrained(load(name), folder).eval()
    assert not [w for w in recwarn if "adapter" in str(w.message)]  # of keys that find no module
    both = merged(Slices.of(params[name]), adapter)
    write(hugging_face.plan(both, config, ids=IDS, about={}), tmp_path / "merged", {})
    ours, theirs = logits_of(load(name, tmp_path / "merged")), logits_of(adapted)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
    assert np.abs(ours - logits_of(load(name))).max() > 0.1  # the adapter matters
    assert_merged_alike(adapted, both, config)


@pytest.mark.parametrize("name", MODELS)
def test_what_peft_saves_merges_as_it_merges(name, params, bases, tmp_path):
    """Ranks, alphas and layers of their own; and the head, whose frozen weight PEFT saves too."""
    load, library = bases
    settings = library.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj", "up_proj", "fc2", "multi_modal_projector", "lm_head"],
        exclude_modules=["1.mlp.up_proj"],
        rank_pattern={"o_proj": 2, "0.mlp.up_proj": 6},
        alpha_pattern={"^.*layers.0.self_attn.q_proj": 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    adapted = library.get_peft_model(load(name), settings)
    adapted.save_pretrained(tmp_path / "peft")
    adapter = open_peft(tmp_path / "peft", MODELS[name])
    assert adapter.rank == 6
    assert_merged_alike(adapted, merged(Slices.of(params[name]), adapter), MODELS[name])
