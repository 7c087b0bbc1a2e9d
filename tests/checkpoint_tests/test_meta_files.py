import dataclasses
import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from l32jax import presets
from l32jax.checkpoint import meta, meta_config, meta_files, meta_ranks, torch_file
from l32jax.checkpoint.engine.flat_files import FlatFiles
from l32jax.checkpoint.engine.slices import Slices, load
from l32jax.checkpoint.engine.sources import Source, Tensor
from l32jax.checkpoint.engine.tables import their_shapes
from l32jax.checkpoint.engine.transfer import write
from l32jax.config import DecoderConfig, LlamaConfig, RopeScaling
from l32jax.errors import InputError
from l32jax.model.llama import shapes_of
from tests import golden
from tests.checkpoint_tests.test_meta import weights
from tests.checkpoint_tests.weights import assert_same, random_params, targets

# The extra keys are those that are not a release's.
TEXT = {
    "dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 256,
    "ffn_dim_multiplier": 1.3, "multiple_of": 128, "norm_eps": 1e-5, "rope_theta": 500000.0,
    "use_scaled_rope": True,
}  # fmt: skip
VISION = TEXT | {
    "n_layers": 8, "multiple_of": 32, "vision_chunk_size": 56, "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 2, "vision_n_heads": 4,
    "vision_return_intermediate": [1, 3, 4],
}  # fmt: skip
MODELS = {
    "llama_tiny_meta": (TEXT, golden.TEXT),
    "mllama_tiny_meta": (VISION, golden.VISION),
}


def save(folder: Path, arrays, params=TEXT, ranks: int = 1) -> Path:
    """A folder of these whole tensors, a file a rank."""
    source = Source.of(arrays, "test")
    files = [
        torch_file.plan_file(
            meta_ranks.shard(source, rank, ranks), arrays, f"consolidated.{rank:02}.pth"
        )
        for rank in range(ranks)
    ]
    write(FlatFiles(files, {}, {"params.json": json.dumps(params).encode()}), folder, {})
    return folder


def unread(config: LlamaConfig) -> Source:
    """The shapes of Meta's checkpoint of this model, without any weights."""
    shapes = their_shapes(meta.table(config), shapes_of(config))
    tensors = {name: Tensor(shape, np.dtype(np.float16)) for name, shape in shapes.items()}

    def read(name: str, rows: slice) -> np.ndarray:
        raise AssertionError(name)

    return Source("shapes", tensors, read)


def export(folder: Path, slices, config, ranks=None, tokenizer=None) -> Path:
    write(meta_files.plan(slices, config, tokenizer=tokenizer, about={}, ranks=ranks), folder, {})
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_gives_back_every_byte(name, ranks, tmp_path):
    params, config = MODELS[name]
    theirs = save(tmp_path / "theirs", weights(name), params, ranks)
    opened = meta_files.open_folder(theirs)
    assert opened.config == config
    back = export(tmp_path / "back", opened.slices, config, ranks)
    assert meta_files.open_folder(back).config == config
    for file in sorted(theirs.glob("*.pth")):
        old, new = (torch_file.open_file(folder / file.name) for folder in (theirs, back))
        assert new.tensors == old.tensors
        for tensor in old.tensors:
            new_bytes, old_bytes = (f.read(tensor, slice(None)).tobytes() for f in (new, old))
            assert new_bytes == old_bytes, tensor
    assert len(list(back.glob("*.pth"))) == ranks


@pytest.mark.parametrize("name", MODELS)
def test_golden_weights_are_read_from_ranks_as_from_one_file(name, tmp_path):
    params, config = MODELS[name]
    folder = save(tmp_path / "two", weights(name), params, ranks=2)
    ours = load(meta_files.open_folder(folder).slices, targets(config))
    assert_same(ours, golden.load_meta(name, config))


def test_torch_loads_the_ranks_of_a_vision_model(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = weights("mllama_tiny_meta")
    config = golden.VISION
    slices = meta_files.open_folder(save(tmp_path / "theirs", arrays, VISION)).slices
    folder = export(tmp_path / "ours", slices, config, ranks=2)
    parts = [torch.load(file, mmap=True) for file in sorted(folder.glob("*.pth"))]
    assert [part.keys() for part in parts] == [arrays.keys()] * 2
    for name, array in arrays.items():
        dim = meta_ranks.split_dim(name, Tensor(array.shape, array.dtype))
        tensors = [part[name] for part in parts]
        whole = tensors[0] if dim is None else torch.cat(tensors, dim=dim)
        np.testing.assert_array_equal(whole, array, err_msg=name)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_has_what_metas_code_gives_it(ranks):
    """Parts of 90B's tensors, as its column- and row-parallel layers split them."""
    config = presets.LLAMA3_2_90B_VISION
    source = unread(config)
    part = meta_ranks.shard(source, 0, ranks).tensors
    sizes = {name.removesuffix(".weight"): tensor.shape for name, tensor in part.items()}
    layer, cross = "text_model.layers.79.", "text_model.cross_attention_layers.19."
    block = "vision_model.vision_encoder.transformer.resblocks.31."
    n = ranks
    expected = {
        "text_model.tok_embeddings": (128256 // n, 8192),
        "text_model.output": (128256 // n, 8192),
        "text_model.learnable_embedding": (8 // n, 8192),
        "text_model.norm": (8192,),
        f"{layer}attention.wq": (8192 // n, 8192),
        f"{layer}attention.wk": (1024 // n, 8192),
        f"{layer}attention.wo": (8192, 8192 // n),
        f"{layer}feed_forward.w1": (28672 // n, 8192),
        f"{layer}feed_forward.w2": (8192, 28672 // n),
        f"{cross}attention.wv": (1024 // n, 8192),
        f"{cross}attention.q_norm": (128,),
        f"{cross}gate_attn": (1,),
        f"{block}attn.wq": (1280 // n, 1280),
        f"{block}attn.wo": (1280, 1280 // n),
        f"{block}mlp.c_fc": (5120 // n, 1280),
        f"{block}mlp.c_fc.bias": (5120 // n,),
        f"{block}mlp.c_proj": (1280, 5120 // n),
        f"{block}mlp.c_proj.bias": (1280,),
        f"{block}ln_1.bias": (1280,),
        "vision_model.vision_encoder.conv1._linear": (1280 // n, 588),
        "vision_model.vision_encoder.class_embedding": (1280,),
        "vision_model.vision_projection": (8192 // n, 7680),
        "vision_model.vision_projection.bias": (8192 // n,),
    }
    assert {name: sizes[name] for name in expected} == expected


def test_a_rank_of_eight_counts_as_the_model_card_does():
    """88.8B on the card of 90B is the sum over its eight files."""
    config = presets.LLAMA3_2_90B_VISION
    source = unread(config)
    part = meta_ranks.shard(source, 7, 8).tensors
    assert 8 * sum(int(np.prod(tensor.shape)) for tensor in part.values()) == 88_809_868_760


@pytest.mark.parametrize("rows", [(0, 64), (0, 5), (30, 34), (32, 64), (63, 64), (7, 7)])
@pytest.mark.parametrize("name", ["layers.0.attention.wq", "layers.0.attention.wo", "norm"])
def test_any_rows_of_joined_ranks_are_those_of_the_whole(rows, name):
    whole = Source.of(weights("llama_tiny_meta"), "whole")
    joined = meta_ranks.joined([meta_ranks.shard(whole, rank, 2) for rank in range(2)], "two")
    assert joined.tensors == whole.tensors
    rows = slice(*rows)
    for source in (joined, meta_ranks.joined([whole], "one")):
        read = source.read(f"{name}.weight", rows)
        np.testing.assert_array_equal(read, whole.read(f"{name}.weight", rows))


def tied(config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, tied_embedding=True)
    )


def test_tied_models_get_a_head_and_are_tied_again(tmp_path):
    config = tied(golden.TEXT)
    params = random_params(config)
    folder = export(tmp_path / "tied", Slices.of(params), config, tokenizer=b"ranks")
    file = torch_file.open_file(folder / "consolidated.00.pth")
    head, embedding = (file.read(f"{n}.weight", slice(None)) for n in ("output", "tok_embeddings"))
    np.testing.assert_array_equal(head, embedding)
    assert (folder / "tokenizer.model").read_bytes() == b"ranks"
    opened = meta_files.open_folder(folder)
    assert opened.config == config
    assert_same(load(opened.slices, targets(config)), params)


def test_head_decides_whether_it_is_tied(tmp_path):
    arrays = weights("llama_tiny_meta")
    untied = save(tmp_path / "untied", arrays)
    assert not meta_files.open_folder(untied).config.decoder.tied_embedding
    arrays["output.weight"] = arrays["tok_embeddings.weight"].copy()
    arrays["output.weight"][-1, -1] += 1
    assert not meta_files.open_folder(
        save(tmp_path / "almost", arrays)
    ).config.decoder.tied_embedding
    del arrays["output.weight"]
    assert meta_files.open_folder(save(tmp_path / "none", arrays)).config.decoder.tied_embedding


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype, tmp_path):
    params = random_params(golden.TEXT)
    folder = export(tmp_path / "m", Slices.of(params).as_dtype(dtype), golden.TEXT)
    slices = meta_files.open_folder(folder).slices
    assert set(slices.dtypes.values()) == {np.dtype(dtype)}
    loaded = load(slices, targets(golden.TEXT, dtype=dtype))
    assert_same(loaded, load(Slices.of(params), targets(golden.TEXT, dtype=dtype)))


def test_same_weights_make_the_same_bytes(tmp_path):
    slices = Slices.of(random_params(golden.TEXT))
    first, second = (export(tmp_path / name, slices, golden.TEXT, ranks=2) for name in "ab")
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_comes_back_from_its_params(name):
    config = presets.preset(name)
    tensors = unread(config).tensors
    content = json.loads(json.dumps(meta_config.to_json(config)))
    fields = meta_config.Fields(content, "params.json")
    decoder = config.decoder
    back = meta_config.from_json(fields, tensors, tied=decoder.tied_embedding, quantised=False)
    assert back == config


RELEASED = {  # llama-models' sku_list.py; 11B's base model has smaller tiles
    "llama3.2-1b": (2048, 16, 32, 1.5, 256), "llama3.2-3b": (3072, 28, 24, 1.0, 256),
    "llama3.1-8b": (4096, 32, 32, 1.3, 1024), "llama3.1-70b": (8192, 80, 64, 1.3, 4096),
    "llama3.2-11b-vision-instruct": (4096, 32, 32, 1.3, 1024, 560, 8),
    "llama3.2-11b-vision": (4096, 32, 32, 1.3, 1024, 448, 8),
    "llama3.2-90b-vision": (8192, 80, 64, 1.3, 4096, 560, 20),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_params_are_the_presets(name):
    width, layers, heads, factor, multiple, *vision = RELEASED[name]
    content = {
        "dim": width, "n_layers": layers, "n_heads": heads, "n_kv_heads": 8,
        "vocab_size": 128256, "ffn_dim_multiplier": factor, "multiple_of": multiple,
        "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
    }  # fmt: skip
    if vision:
        content |= {"vision_chunk_size": vision[0], "vision_max_num_chunks": 4}
        content |= {"vision_num_cross_attention_layers": vision[1]}
    config = presets.preset(name)
    tensors = unread(config).tensors
    fields = meta_config.Fields(dict(content), "params.json")
    tied = config.decoder.tied_embedding
    assert meta_config.from_json(fields, tensors, tied=tied, quantised=False) == config
    written = meta_config.to_json(config)
    assert written.keys() == content.keys(), "keys of ours are for other models"


def test_params_may_be_silent_and_old(tmp_path):
    arrays = weights("mllama_tiny_meta")
    params = {k: v for k, v in VISION.items() if k not in ("norm_eps", "rope_theta")}
    number = params.pop("vision_num_cross_attention_layers")
    params["vision_model"] = {"cross_attention_adapter": {"num_layers": number}}
    params["vocab_size"] = -1
    assert meta_files.open_folder(save(tmp_path / "old", arrays, params)).config == golden.VISION


def test_explicit_rope_keys_win(tmp_path):
    params = TEXT | {"rope_scaling_factor": 5, "rope_high_freq_factor": 2, "max_context": 99}
    decoder = meta_files.open_folder(
        save(tmp_path / "m", weights("llama_tiny_meta"), params)
    ).config.decoder
    assert decoder.rope_scaling == RopeScaling(factor=5.0, high_freq_factor=2.0)
    assert decoder.max_context == 99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_experts": 4}, r"'n_experts' in .*params.json: this key \(value 4\) is unknown here"),
        ({"dim": 65}, r"'dim' in .*: it is 65, expected a multiple of n_heads=4"),
        ({"dim": [64]}, r"'dim' in .*: it is \[64\], expected an integer"),
        ({"n_layers": 10**9}, r"'n_layers' in .*: it is 1000000000, expected an integer"),
        ({"multiple_of": 16}, r"has shape \[256, 64\]: .*mlp/gate/weight.* \[224, 64\]"),
        ({"ffn_dim_multiplier": 1e20}, r"'ffn_dim_multiplier' in .*: it is 1e\+20, expected one"),
        ({"use_scaled_rope": "yes"}, r"'use_scaled_rope' in .*: it is 'yes', expected True or"),
        ({"n_kv_heads": 1}, r"has shape \[32, 64\]: .* \[16, 64\]"),
        ({"lora_args": {"rank": 2}}, r"'lora_args' in .*: it is .*, expected"),
    ],
)  # fmt: skip
def test_params_that_do_not_fit_are_refused(change, message, tmp_path):
    folder = save(tmp_path / "m", weights("llama_tiny_meta"), TEXT | change)
    with pytest.raises(InputError, match=message) as caught:
        meta_files.open_folder(folder)
    assert "\n" not in str(caught.value)


def test_vision_params_that_do_not_fit_are_refused(tmp_path):
    arrays = weights("mllama_tiny_meta")
    for number, (change, message) in enumerate(
        [
            ({"vision_return_intermediate": [1, 3]}, r"has shape \[64, 256\]: .* \[64, 192\]"),
            ({"vision_num_cross_attention_layers": 9}, "it is 9, expected an integer between 1"),
            ({"vision_chunk_size": 70}, r"positional_embedding' has shape"),
            ({"vision_chunk_size": "big"}, "it is 'big', expected an integer"),
        ]
    ):
        folder = save(tmp_path / str(number), arrays, VISION | change)
        with pytest.raises(InputError, match=message):
            meta_files.open_folder(folder)
    folder = save(tmp_path / "text", weights("llama_tiny_meta"), VISION)
    with pytest.raises(InputError, match=r"conv1._linear.weight': a checkpoint with this params"):
        meta_files.open_folder(folder)


def rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: rename(f, "consolidated.01.pth", "consolidated.03.pth"), "none is .*01.pth'"),
        (lambda f: rename(f, "consolidated.01.pth", "consolidated.pth"), "none is .*01.pth'"),
        (lambda f: (f / "consolidated.00.pth").unlink(), "of 1 files .* none is .*00.pth'"),
        (lambda f: [p.unlink() for p in f.glob("*.pth")], "of 0 files .* none is .*00.pth'"),
        (lambda f: (f / "params.json").unlink(), "params.json: No such file"),
        (lambda f: (f / "consolidated.01.pth").unlink(), r"tensor .* has shape"),
    ],
)  # fmt: skip
def test_missing_files_are_one_error_that_names_them(damage, message, tmp_path):
    folder = save(tmp_path / "m", weights("llama_tiny_meta"), ranks=2)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        meta_files.open_folder(folder)
    assert "\n" not in str(caught.value)


def replace_rank(folder: Path, change) -> None:
    """Another file of the second rank, of its changed tensors."""
    path = folder / "consolidated.01.pth"
    source = torch_file.open_file(path)
    arrays = {name: source.read(name, slice(None)).copy() for name in source.tensors}
    change(arrays)
    path.unlink()
    write(
        FlatFiles(
            [torch_file.plan_file(Source.of(arrays, ""), arrays, path.name)], {}, {}, path.name
        ),
        path,
        {},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.weight"), "'norm.weight' is in this file or in .*, not in both"),
        (lambda w: w.update({"norm.weight": w["norm.weight"] * 2}), "'norm.weight' .* differs"),
        (lambda w: w.update({"norm.weight": w["norm.weight"][:3]}), r"it is float32\[3\], and"),
        (lambda w: w.update({"norm.weight": w["norm.weight"].astype(np.float16)}), "is float16"),
    ],
)  # fmt: skip
def test_ranks_that_disagree_are_refused(change, message, tmp_path):
    folder = save(tmp_path / "m", weights("llama_tiny_meta"), ranks=2)
    replace_rank(folder, change)
    with pytest.raises(InputError, match=message):
        meta_files.open_folder(folder)


def test_more_ranks_than_heads_are_refused(tmp_path):
    """As in the release of 405B for 16 devices, which repeats its key and value heads."""
    arrays = weights("llama_tiny_meta")
    slices = meta_files.open_folder(save(tmp_path / "one", arrays)).slices
    for ranks in (0, 4):
        with pytest.raises(InputError, match=f"{ranks} ranks in .* there are 2; use at most"):
            meta_files.plan(slices, golden.TEXT, tokenizer=None, about={}, ranks=ranks)
    repeated = {
        name: np.repeat(a.reshape(2, -1, 64), 2, axis=0).reshape(-1, 64)
        if ".wk." in name or ".wv." in name else a
        for name, a in arrays.items()
    }  # fmt: skip
    with pytest.raises(InputError, match="4 ranks in .* there are 2"):
        meta_files.open_folder(save(tmp_path / "four", repeated, ranks=4))


def test_tensors_without_even_parts_are_refused():
    decoder = dataclasses.replace(golden.TEXT.decoder, vocab_size=257)
    config = LlamaConfig(decoder=decoder)
    slices = Slices.of(random_params(config))
    with pytest.raises(InputError, match=r"2 ranks: tensor 'tok_embeddings.weight' of shape \[257"):
        meta_files.plan(slices, config, tokenizer=None, about={}, ranks=2)


def test_as_many_files_as_the_releases_have():
    """Shapes alone: no weights of 90B are here."""
    for name, files in {
        "llama3.1-8b": 1,
        "llama3.2-11b-vision": 1,
        "llama3.2-90b-vision": 8,
    }.items():
        config = presets.preset(name)
        shapes = shapes_of(config)
        dtypes = dict.fromkeys(shapes, np.dtype(ml_dtypes.bfloat16))
        slices = Slices(name, shapes, dtypes, lambda *_: None)
        plan = meta_files.plan(slices, config, tokenizer=None, about={})
        names = [file.name for file in plan.files]
        assert names == [f"consolidated.{rank:02}.pth" for rank in range(files)]


def test_models_that_metas_format_cannot_express_are_refused():
    decoder = dataclasses.replace(golden.TEXT.decoder, head_dim=8)
    with pytest.raises(InputError, match="head_dim=8: Meta's format has no such setting"):
        meta_config.to_json(LlamaConfig(decoder=decoder))
    pattern = ("cross", "self", "self")
    decoder = dataclasses.replace(golden.VISION.decoder, group_pattern=pattern)
    with pytest.raises(InputError, match="other places for 2 cross-attention blocks among 4"):
        meta_config.to_json(dataclasses.replace(golden.VISION, decoder=decoder))


def test_quantised_tensors_of_a_plain_checkpoint_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {k: torch.from_numpy(v) for k, v in weights("llama_tiny_meta").items()}
    arrays["norm.weight"] = arrays["norm.weight"].to(torch.int8)
    torch.save(arrays, tmp_path / "consolidated.pth")
    (tmp_path / "params.json").write_text(json.dumps(TEXT))
    with pytest.raises(InputError, match="'norm.weight' in .*: dtype int8, expected float32"):
        meta_files.open_folder(tmp_path)


@pytest.fixture
def metas_model(monkeypatch):
    """Meta's own module; its layers for several devices are torch's, as one device makes them."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("llama_models")

    class Linear(torch.nn.Linear):
        def __init__(self, ins, outs, bias=True, **_):
            super().__init__(ins, outs, bias)

    class Embedding(torch.nn.Embedding):
        def __init__(self, size, width, **_):
            super().__init__(size, width)

    initialize = types.ModuleType("fairscale.nn.model_parallel.initialize")
    initialize.get_model_parallel_world_size = lambda: 1
    layers = types.ModuleType("fairscale.nn.model_parallel.layers")
    layers.ColumnParallelLinear = layers.RowParallelLinear = Linear
    layers.VocabParallelEmbedding = Embedding
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    parallel = sys.modules["fairscale.nn.model_parallel"]
    parallel.initialize, parallel.layers = initialize, layers
    monkeypatch.setitem(sys.modules, initialize.__name__, initialize)
    monkeypatch.setitem(sys.modules, layers.__name__, layers)
    from llama_models.llama3 import args, model

    return torch, args.ModelArgs, model.Transformer


@pytest.mark.parametrize("is_tied", [False, True])
def test_metas_own_code_loads_our_folder_and_computes_the_same(metas_model, is_tied, tmp_path):
    torch, ModelArgs, Transformer = metas_model
    config = tied(golden.TEXT) if is_tied else golden.TEXT
    params = random_params(config)
    folder = export(tmp_path / "m", Slices.of(params), config)
    content = json.loads((folder / "params.json").read_text())
    model = Transformer(ModelArgs(max_seq_len=16, max_batch_size=1, **content))
    file = folder / "consolidated.00.pth"
    model.load_state_dict(torch.load(file, map_location="cpu", mmap=True), strict=True)
    tokens = np.arange(3, 15)[None]
    theirs = model(torch.from_numpy(tokens), 0).numpy()
    np.testing.assert_allclose(golden.logits(config, params, tokens), theirs, atol=2e-5)


def test_decoders_of_any_sizes_come_back(tmp_path):
    """Factors and multiples of an MLP that no release has."""
    for width, mlp in [(64, 1), (64, 169), (64, 170), (64, 171), (96, 255), (576, 1536), (8, 9999)]:
        decoder = DecoderConfig(
            vocab_size=7, embed_dim=width, num_heads=2, num_kv_heads=1, head_dim=width // 2,
            mlp_dim=mlp, num_groups=1, max_context=12, rope_theta=3.0,
        )  # fmt: skip
        config = LlamaConfig(decoder=decoder)
        fields = meta_config.Fields(meta_config.to_json(config), "params.json")
        assert meta_config.from_json(fields, {}, tied=False, quantised=False) == config
