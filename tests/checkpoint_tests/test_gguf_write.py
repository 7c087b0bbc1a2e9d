"""GGUF files written here, as the package gguf, transformers and we ourselves read them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from l32jax.checkpoint import gguf, gguf_file
from l32jax.checkpoint.engine import transfer
from l32jax.checkpoint.engine.slices import Slices, load
from l32jax.checkpoint.gguf_write import FILE_TYPES, plan
from l32jax.config import LlamaConfig, RopeScaling, VisionConfig
from l32jax.errors import InputError
from l32jax.model.rope import frequencies
from tests import golden
from tests.checkpoint_tests.test_gguf import SMALL
from tests.checkpoint_tests.weights import assert_same, random_params, targets, tensors_of

library = pytest.importorskip("gguf")

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"<{i}>" for i in range(64)],
    "tokenizer.ggml.token_type": [1] * 63 + [3],
    "tokenizer.ggml.merges": ["a b", "\u0120 \u00e9"],
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.bos_token_id": 63,
}
DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


def variant(**changes: Any) -> LlamaConfig:
    return LlamaConfig(decoder=dataclasses.replace(SMALL.decoder, **changes))


def written(
    path: Path, slices: Slices, config: LlamaConfig, kind: str, tokenizer: Any = TOKENIZER
) -> Path:
    output = plan(slices, config, kind=kind, tokenizer=tokenizer, name="small", about={"to": kind})
    transfer.write(output, path)
    return path


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


def loaded(path: Path, config: LlamaConfig) -> dict:
    return load(gguf.open_file(path, config), targets(config))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("factor", [None, 32.0, 10.0])
def test_float32_comes_back_bit_by_bit_with_its_config(tied, factor, tmp_path):
    scaling = RopeScaling(factor=factor) if factor else None
    config = variant(tied_embedding=tied, rope_scaling=scaling, rope_theta=10_000.0)
    params = random_params(config)
    path = written(tmp_path / "x.gguf", Slices.of(params), config, "F32")
    assert gguf.read_config(path) == config
    assert_same(loaded(path, config), params)
    assert ("output.weight" in gguf_file.read(path).tensors) != tied


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_keeps_its_dtype_and_is_written_back_byte_by_byte(kind, tmp_path, params):
    path = written(tmp_path / "x.gguf", Slices.of(params), SMALL, kind)
    slices = gguf.open_file(path, SMALL)
    assert slices.dtypes["decoder/embedding/weight"] == DTYPES[kind]
    assert slices.dtypes["decoder/final_norm/scale"] == np.float32
    read = loaded(path, SMALL)
    for name, array in tensors_of(gguf.table(SMALL), params).items():
        rounded = array if array.ndim == 1 else array.astype(DTYPES[kind]).astype(np.float32)
        assert np.array_equal(tensors_of(gguf.table(SMALL), read)[name], rounded), name
    again = written(tmp_path / "y.gguf", slices, SMALL, kind)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_the_package_reads_the_values_and_metadata_we_meant(kind, tmp_path, params):
    path = written(tmp_path / "x.gguf", Slices.of(params), SMALL, kind)
    reader = library.GGUFReader(path)
    arrays = tensors_of(gguf.table(SMALL), params)
    plain = frequencies(16, theta=500_000.0, scaling=None)
    scaled = frequencies(16, theta=500_000.0, scaling=SMALL.decoder.rope_scaling)
    arrays[gguf.ROPE_DIVISORS] = plain / scaled
    assert {tensor.name for tensor in reader.tensors} == arrays.keys()
    for tensor in reader.tensors:
        expected = "F32" if arrays[tensor.name].ndim == 1 else kind
        if (tensor.name, kind) == ("output.weight", "Q4_0"):
            expected = "Q8_0"
        assert tensor.tensor_type.name == expected, tensor.name
        stored = library.quants.quantize(arrays[tensor.name], tensor.tensor_type)
        assert np.array_equal(tensor.data.view(np.uint8), stored.view(np.uint8)), tensor.name
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.file_type"] == FILE_TYPES[kind]
    assert fields.items() >= TOKENIZER.items()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantised_files_are_read_as_the_package_dequantises_them(kind, tmp_path, params):
    path = written(tmp_path / "x.gguf", Slices.of(params), SMALL, kind)
    read = tensors_of(gguf.table(SMALL), loaded(path, SMALL))
    for tensor in library.GGUFReader(path).tensors:
        if tensor.name != gguf.ROPE_DIVISORS:
            values = library.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(read[tensor.name], values), tensor.name


def test_metadata_has_the_keys_and_types_of_llama_cpps_converter(tmp_path, params):
    reader = library.GGUFReader(written(tmp_path / "x.gguf", Slices.of(params), SMALL, "Q8_0"))
    text, whole, real = "STRING", "UINT32", "FLOAT32"
    expected = {
        "general.architecture": ("llama", text),
        "general.type": ("model", text),
        "general.name": ("small", text),
        "general.file_type": (7, whole),
        "general.quantization_version": (2, whole),
        "llama.block_count": (2, whole),
        "llama.context_length": (4096, whole),
        "llama.embedding_length": (32, whole),
        "llama.feed_forward_length": (96, whole),
        "llama.attention.head_count": (4, whole),
        "llama.attention.head_count_kv": (2, whole),
        "llama.attention.key_length": (16, whole),
        "llama.attention.value_length": (16, whole),
        "llama.attention.layer_norm_rms_epsilon": (pytest.approx(1e-5), real),
        "llama.rope.freq_base": (500_000.0, real),
        "llama.rope.dimension_count": (16, whole),
        "llama.vocab_size": (64, whole),
    }
    fields = {n: f for n, f in reader.fields.items() if n.startswith(("general", "llama"))}
    assert {n: (f.contents(), f.types[0].name) for n, f in fields.items()} == expected
    types = {n: [t.name for t in f.types] for n, f in reader.fields.items() if "ggml" in n}
    assert types["tokenizer.ggml.token_type"] == ["ARRAY", "INT32"]
    assert types["tokenizer.ggml.merges"] == ["ARRAY", "STRING"]
    assert types["tokenizer.ggml.bos_token_id"] == ["UINT32"]
    assert types["tokenizer.ggml.add_bos_token"] == ["BOOL"]


def test_tensors_are_where_llama_cpp_insists_on(tmp_path, params):
    """One after the other in the order of the header, each at the next multiple of 32."""
    path = written(tmp_path / "x.gguf", Slices.of(params), SMALL, "Q4_0")
    tensors = list(gguf_file.read(path).tensors.values())
    for tensor, after in zip(tensors, tensors[1:], strict=False):
        assert after.offset == -(-tensor.end // 32) * 32
    assert path.stat().st_size == -(-tensors[-1].end // 32) * 32


def test_the_same_input_makes_the_same_bytes(tmp_path, params, monkeypatch):
    one = written(tmp_path / "one.gguf", Slices.of(params), SMALL, "Q4_0")
    monkeypatch.setattr(transfer, "SLAB_BYTES", 512)
    two = written(tmp_path / "two.gguf", Slices.of(params), SMALL, "Q4_0")
    assert one.read_bytes() == two.read_bytes()


def test_logits_of_a_tied_4_bit_model_come_from_8_bits(tmp_path):
    config = variant(tied_embedding=True)
    path = written(tmp_path / "x.gguf", Slices.of(random_params(config)), config, "Q4_0")
    kinds = {name: tensor.kind.name for name, tensor in gguf_file.read(path).tensors.items()}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"


def test_rows_that_do_not_fill_blocks_are_written_in_float16(tmp_path):
    config = variant(embed_dim=48)
    path = written(tmp_path / "x.gguf", Slices.of(random_params(config)), config, "Q8_0")
    kinds = {name: tensor.kind.name for name, tensor in gguf_file.read(path).tensors.items()}
    assert kinds["blk.0.ffn_up.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"  # of rows of 96
    assert gguf.read_config(path) == config


def test_missing_tokens_are_filled_in_and_too_many_refused(tmp_path, params):
    fewer = {key: v[:60] if isinstance(v, list) else v for key, v in TOKENIZER.items()}
    path = written(tmp_path / "x.gguf", Slices.of(params), SMALL, "F16", fewer)
    metadata = gguf_file.read(path).metadata
    assert metadata["tokenizer.ggml.tokens"][59:62] == ["<59>", "[PAD60]", "[PAD61]"]
    assert metadata["tokenizer.ggml.token_type"][59:].tolist() == [1, 5, 5, 5, 5]
    more = TOKENIZER | {"tokenizer.ggml.tokens": ["a"] * 65}
    with pytest.raises(InputError, match="has 65 tokens, the model 64"):
        written(tmp_path / "y.gguf", Slices.of(params), SMALL, "F16", more)


def test_empty_lists_are_left_out(tmp_path, params):
    entries = {"tokenizer.ggml.model": "none", "tokenizer.ggml.merges": []}
    path = written(tmp_path / "x.gguf", Slices.of(params), SMALL, "F16", entries)
    metadata = gguf_file.read(path).metadata
    assert metadata["tokenizer.ggml.model"] == "none"
    assert "tokenizer.ggml.merges" not in metadata


@pytest.mark.parametrize(("kind", "value"), [("F16", 7e4), ("Q8_0", 1e7), ("Q4_0", -6e5)])
def test_a_value_that_the_kind_cannot_hold_is_refused(kind, value, tmp_path):
    params = random_params(SMALL)
    mlp = params["decoder"]["groups"]["blocks"][0]["mlp"]
    mlp["up"]["weight"] = np.array(mlp["up"]["weight"])
    mlp["up"]["weight"][1, 3, 4] = value
    with pytest.raises(InputError, match="'blk.1.ffn_up.weight' in memory: a value is larger"):
        written(tmp_path / "x.gguf", Slices.of(params), SMALL, kind)
    assert not list(tmp_path.iterdir())
    written(tmp_path / "x.gguf", Slices.of(params), SMALL, "BF16")


def test_vision_models_are_refused():
    decoder = dataclasses.replace(SMALL.decoder, group_pattern=("self", "cross"))
    vision = VisionConfig(
        image_size=28, embed_dim=32, num_heads=2, mlp_dim=64, num_local_layers=2, taps=(0,)
    )
    config = LlamaConfig(decoder=decoder, vision=vision)
    nothing = Slices("memory", {}, {}, lambda home, rows: None)
    with pytest.raises(InputError, match="no layout for Llama 3.2 Vision in GGUF; use"):
        plan(nothing, config, kind="F16", tokenizer={}, name="x", about={})


def test_bfloat16_sources_are_packed_as_their_float32_values(tmp_path, params):
    half = Slices.of(params).as_dtype(ml_dtypes.bfloat16)
    path = written(tmp_path / "x.gguf", half, SMALL, "Q8_0")
    wide = half.as_dtype(np.float32)
    assert path.read_bytes() == written(tmp_path / "y.gguf", wide, SMALL, "Q8_0").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("F32", False), ("F16", True), ("Q8_0", False)])
def test_transformers_reads_the_same_model(kind, tied, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = variant(tied_embedding=tied, rope_scaling=None)
    path = written(tmp_path / "x.gguf", Slices.of(random_params(config)), config, kind)
    # What `from_pretrained(folder, gguf_file=)` calls, once it has found the package accelerate.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    theirs = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    model = transformers.LlamaForCausalLM(theirs).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    problems = model.load_state_dict({name: t.float() for name, t in read.items()}, strict=False)
    assert not problems.unexpected_keys and problems.missing_keys in ([], ["lm_head.weight"])
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = golden.logits(config, loaded(path, config), tokens)
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()
