"""GGUF files: a real one, small ones made here, and damaged ones."""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l32jax.checkpoint import gguf, gguf_file
from l32jax.checkpoint.tables import ROTARY_PAIRS, unload
from l32jax.config import DecoderConfig, LlamaConfig, MeshConfig, RopeScaling
from l32jax.errors import InputError
from l32jax.model.rope import frequencies
from l32jax.presets import SMOLLM2_135M
from l32jax.sharding import make_mesh
from tests import golden
from tests.checkpoint_tests.weights import assert_same, random_params, targets
from tests.data_tests.real_tokenizers import smollm2_file
from tests.smollm2 import halves, transformers_model

library = pytest.importorskip("gguf")

SMALL = LlamaConfig(
    decoder=DecoderConfig(
        vocab_size=64,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,  # not embed_dim / num_heads: such files carry key_length
        mlp_dim=96,
        num_groups=2,
        rope_scaling=RopeScaling(factor=32.0),
        max_context=4096,
    )
)


def write(path, params, config=SMALL, *, architecture="llama", **metadata) -> Path:
    """As llama.cpp's converter does, with the metadata of `config` or what is given instead."""
    decoder = config.decoder
    everything = {
        "block_count": decoder.num_groups,
        "context_length": decoder.max_context,
        "embedding_length": decoder.embed_dim,
        "feed_forward_length": decoder.mlp_dim,
        "attention.head_count": decoder.num_heads,
        "attention.head_count_kv": decoder.num_kv_heads,
        "attention.key_length": decoder.head_dim,
        "attention.value_length": decoder.head_dim,
        "rope.dimension_count": decoder.head_dim,
        "vocab_size": decoder.vocab_size,
    } | {name.replace("__", "."): value for name, value in metadata.items()}
    writer = library.GGUFWriter(path, architecture)
    for name, value in everything.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", decoder.rope_theta)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", decoder.norm_eps)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1])
    for name, array in unload(gguf.table(config), params):
        writer.add_tensor(name, np.ascontiguousarray(array))
    if decoder.rope_scaling is not None:
        how = {"theta": decoder.rope_theta}
        plain = frequencies(decoder.head_dim, scaling=None, **how)
        scaled = frequencies(decoder.head_dim, scaling=decoder.rope_scaling, **how)
        writer.add_tensor(gguf.ROPE_DIVISORS, (plain / scaled).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


@pytest.fixture(scope="module")
def small(tmp_path_factory, params):
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", params)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_file()


def test_small_file_loads_bit_by_bit_on_every_mesh(small, params):
    assert gguf.read_config(small) == SMALL
    assert_same(gguf.load(small, SMALL, targets(SMALL)), params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert_same(gguf.load(small, SMALL, targets(SMALL, mesh)), params)


def test_real_file_has_the_presets_config(smollm2):
    assert gguf.read_config(smollm2) == SMOLLM2_135M


@pytest.mark.slow
def test_real_file_equals_the_librarys_dequantisation_and_transformers(smollm2):
    params = gguf.load(smollm2, SMOLLM2_135M, targets(SMOLLM2_135M))
    reader = library.GGUFReader(smollm2)
    theirs = {t.name: library.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    ours = dict(unload(gguf.table(SMOLLM2_135M), params))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert np.array_equal(ours[name], array), name

    torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
    model = transformers_model(smollm2)
    tokens = np.random.default_rng(0).integers(0, 49152, (2, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = golden.logits(SMOLLM2_135M, params, tokens)
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0"])
def test_quantised_tensors_are_dequantised(kind, tmp_path, params):
    kind = library.GGMLQuantizationType[kind]
    arrays = dict(unload(gguf.table(SMALL), params))
    name = "blk.1.ffn_down.weight"
    packed = library.quants.quantize(arrays[name], kind)
    writer_path = write(tmp_path / "x.gguf", params)
    reader = library.GGUFReader(writer_path)
    writer = library.GGUFWriter(tmp_path / "y.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("llama."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = gguf.load(tmp_path / "y.gguf", SMALL, targets(SMALL))
    down = np.asarray(ours["decoder"]["groups"]["blocks"][0]["mlp"]["down"]["weight"][1])
    assert np.array_equal(down, library.quants.dequantize(packed, kind))
    assert not np.array_equal(down, arrays[name])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"architecture": "mllama"}, "'general.architecture'.* it is 'mllama'"),
        ({"expert_count": 8}, "'expert_count'"),
        ({"attention__sliding_window": 9}, "'attention.sliding_window'.* is unknown"),
        ({"rope__dimension_count": 8}, "'rope.dimension_count'"),
        ({"attention__value_length": 8}, "'attention.value_length'"),
        ({"block_count": 2**31}, "'block_count'"),
    ],
)
def test_other_models_are_refused_by_key(metadata, message, tmp_path, params):
    path = write(tmp_path / "x.gguf", params, **metadata)
    with pytest.raises(InputError, match=message):
        gguf.read_config(path)


def test_metadata_and_tensors_must_agree(tmp_path, params):
    path = write(tmp_path / "x.gguf", params, block_count=3)
    config = gguf.read_config(path)
    with pytest.raises(InputError, match="'blk.2.attn_norm.weight' is missing"):
        gguf.load(path, config, targets(config))


def test_rotary_divisors_are_the_scaling(small, tmp_path, params):
    decoder = dataclasses.replace(SMALL.decoder, rope_scaling=None)
    plain = dataclasses.replace(SMALL, decoder=decoder)
    assert gguf.read_config(write(tmp_path / "plain.gguf", params, plain)) == plain
    with pytest.raises(InputError, match="rope_freqs.weight.*load with the config"):
        gguf.load(small, plain, targets(plain))
    odd = dataclasses.replace(decoder, rope_scaling=RopeScaling(factor=8.0, high_freq_factor=9.0))
    path = write(tmp_path / "odd.gguf", params, dataclasses.replace(SMALL, decoder=odd))
    with pytest.raises(InputError, match="does not divide the 8 rotary frequencies"):
        gguf.read_config(path)


def test_rotary_rows_are_those_of_neighbouring_pairs(small, params):
    reader = library.GGUFReader(small)
    (stored,) = (t.data for t in reader.tensors if t.name == "blk.1.attn_q.weight")
    ours = np.asarray(params["decoder"]["groups"]["blocks"][0]["attention"]["query"]["weight"][1])
    assert np.array_equal(halves(stored, heads=4), ours.reshape(stored.shape))
    assert np.array_equal(ROTARY_PAIRS.write(ours, stored.shape), stored)


@settings(
    max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_header_is_an_input_error_or_a_config(data, small, tmp_path):
    content = bytearray(small.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, 2500))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "x.gguf").write_bytes(content)
    try:
        gguf.read_config(tmp_path / "x.gguf")
    except InputError as error:
        assert "\n" not in str(error)


def test_absurd_array_length_fails_at_once(small, tmp_path):
    """The package's own reader would go on for 2**56 items after the end of the file."""
    content = bytearray(small.read_bytes())
    at = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    content[at + 7] = 1
    (tmp_path / "x.gguf").write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(InputError, match="has a count of 72057594037927938"):
        gguf.read_config(tmp_path / "x.gguf")
    assert time.monotonic() - begin < 5


def test_header_holds_what_the_package_reads(smollm2):
    file, reader = gguf_file.read(smollm2), library.GGUFReader(smollm2)
    for name, tensor in {tensor.name: tensor for tensor in reader.tensors}.items():
        assert file.tensors[name].offset == tensor.data_offset
        assert file.tensors[name].kind == tensor.tensor_type
        assert file.tensors[name].shape == tuple(reversed(tensor.shape.tolist()))
    fields = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    for name, value in fields.items():
        ours = file.metadata[name]
        assert (ours.tolist() if isinstance(ours, np.ndarray) else ours) == value, name


def test_missing_package_says_how_to_install(monkeypatch, small):
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(InputError, match=r"pip install 'l32jax\[gguf\]'"):
        gguf.load(small, SMALL, targets(SMALL))


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        gguf.read_config(tmp_path / "nothing.gguf")
