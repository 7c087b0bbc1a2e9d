"""GGUF files: a real one, small ones made here, and damaged ones."""

import contextlib
import dataclasses
import re
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l32jax.checkpoint import gguf, gguf_file, gguf_kinds
from l32jax.checkpoint.engine.slices import load
from l32jax.checkpoint.engine.tables import ROTARY_PAIRS
from l32jax.config import DecoderConfig, LlamaConfig, MeshConfig, RopeScaling
from l32jax.errors import InputError
from l32jax.model.rope import frequencies
from l32jax.presets import SMOLLM2_135M
from l32jax.sharding import make_mesh
from tests import golden
from tests.checkpoint_tests.weights import assert_same, random_params, targets, tensors_of
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
    for name, array in tensors_of(gguf.table(config), params).items():
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


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def crafted(
    folder: Path,
    tensors: dict[str, tuple[tuple[int, ...], int, int]],
    content: bytes = b"",
    entries: dict[str, bytes] | None = None,
) -> Path:
    """A file of these tensors (shape, kind's number, offset) and raw metadata, however absurd."""
    entries = entries or {}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    head += b"".join(string(key) + value for key, value in entries.items())
    for name, (shape, kind, offset) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, offset)
    path = folder / "crafted.gguf"
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + content)
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
    assert_same(load(gguf.open_file(small, SMALL), targets(SMALL)), params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert_same(load(gguf.open_file(small, SMALL), targets(SMALL, mesh)), params)


def test_real_file_has_the_presets_config(smollm2):
    assert gguf.read_config(smollm2) == SMOLLM2_135M


@pytest.mark.slow
def test_real_file_equals_the_librarys_dequantisation_and_transformers(smollm2):
    params = load(gguf.open_file(smollm2, SMOLLM2_135M), targets(SMOLLM2_135M))
    reader = library.GGUFReader(smollm2)
    theirs = {t.name: library.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    ours = tensors_of(gguf.table(SMOLLM2_135M), params)
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


def unpackable() -> list[str]:
    """Every kind that the package can dequantise, by trying."""
    names = []
    for kind, (_, size) in library.GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError):
            library.quants.dequantize(np.zeros((1, size), np.uint8), kind)
            names.append(kind.name)
    return names


def test_the_kinds_we_say_we_read_are_those_of_the_package():
    listed = set(re.findall(r"\b(?:I?Q|TQ|MXFP|NVFP)\d\w*", gguf_kinds.__doc__))
    assert {*listed, "F32", "F16", "BF16"} == set(unpackable())


@pytest.mark.parametrize("name", unpackable())
def test_rows_of_every_kind_are_those_of_the_whole_tensor(name, tmp_path):
    kind = library.GGMLQuantizationType[name]
    block, size = library.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (37, 2 * size), np.uint8)
    path = crafted(tmp_path, {"x": ((37, 2 * block), int(kind), 0)}, stored.tobytes())
    with np.errstate(all="ignore"):  # random bytes are NaN and infinite numbers too
        whole = library.quants.dequantize(stored, kind)
        file = gguf_file.read(path)
        for rows in (slice(0, 37), slice(20, 23), slice(36, 37)):
            values = file.read("x", rows)
            assert values.dtype == file.tensors["x"].kind.dtype
            assert np.array_equal(values.astype(np.float32), whole[rows], equal_nan=True)


def test_only_the_rows_asked_for_are_dequantised(tmp_path, monkeypatch):
    stored = np.zeros((50, 34), np.uint8)
    file = gguf_file.read(crafted(tmp_path, {"x": ((50, 32), 8, 0)}, stored.tobytes()))
    shapes, dequantize = [], library.quants.dequantize
    monkeypatch.setattr(
        library.quants,
        "dequantize",
        lambda data, kind: shapes.append(data.shape) or dequantize(data, kind),
    )
    file.read("x", slice(7, 10))
    assert shapes == [(3, 34)]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"architecture": "qwen3"}, "'general.architecture'.* it is 'qwen3', expected 'llama'"),
        ({"architecture": "mllama"}, "'mllama', which only Ollama.*no layout for Llama 3.2 Vision"),
        ({"architecture": "clip"}, "'clip', the image encoder.*no layout for Llama 3.2 Vision"),
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
        load(gguf.open_file(path, config), targets(config))


def test_rotary_divisors_are_the_scaling(small, tmp_path, params):
    decoder = dataclasses.replace(SMALL.decoder, rope_scaling=None)
    plain = dataclasses.replace(SMALL, decoder=decoder)
    assert gguf.read_config(write(tmp_path / "plain.gguf", params, plain)) == plain
    with pytest.raises(InputError, match="rope_freqs.weight.*load with the config"):
        load(gguf.open_file(small, plain), targets(plain))
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
        gguf.open_file(tmp_path / "x.gguf", gguf.read_config(tmp_path / "x.gguf"))
    except InputError as error:
        assert "\n" not in str(error)


ALIGNMENT = "general.alignment"


@pytest.mark.parametrize(
    ("tensors", "entries", "message"),
    [
        ({"a": ((4, 8), 0, 0), "b": ((4, 8), 0, 96)}, {}, "'b' overlaps"),
        ({"a": ((4, 8), 0, 64), "b": ((4, 8), 0, 64)}, {}, "'b' overlaps"),
        ({"a": ((4, 8), 0, 4)}, {}, "'a' does not begin at a multiple of 32"),
        ({"a": ((4, 8), 0, 0)}, {ALIGNMENT: struct.pack("<II", 4, 0)}, "alignment is 0"),
        ({"a": ((4, 8), 0, 0)}, {ALIGNMENT: struct.pack("<II", 4, 2**31)}, "alignment is 2147"),
        (
            {"a": ((4, 8), 0, 0)},
            {ALIGNMENT: struct.pack("<IQ", 10, 2**64 - 1)},
            "alignment is 1844",
        ),
        ({"a": ((4, 8), 0, 0)}, {ALIGNMENT: struct.pack("<Iq", 11, -32)}, "alignment is -32"),
        ({"a": ((4, 8), 0, 0)}, {ALIGNMENT: struct.pack("<If", 6, 32)}, "alignment is 32.0"),
        ({"a": ((4, 8), 0, 0)}, {ALIGNMENT: struct.pack("<II", 4, 2**20)}, "ends early"),
        ({"a": ((4, 9), 0, 128)}, {}, "ends early, inside of tensor 'a'"),
        ({"a": ((4, 8), 0, 2**64 - 32)}, {}, "ends early, inside of tensor 'a'"),
        ({"a": ((2**32, 2**32), 0, 0)}, {}, "ends early, inside of tensor 'a'"),
        ({"a": ((2**63, 2, 2**63, 2), 8, 0)}, {}, "'a' of shape .* cannot be Q8_0"),
        ({"a": ((4, 31), 2, 0)}, {}, r"'a' of shape \[4, 31\] cannot be Q4_0"),
        ({"a": ((4, 128), 12, 0)}, {}, r"'a' of shape \[4, 128\] cannot be Q4_K"),
        ({"a": ((0, 32), 0, 0)}, {}, r"'a' of shape \[0, 32\] cannot be F32"),
        ({"a": ((4, 8), 4, 0)}, {}, "kind 4 are not read"),
        ({"a": ((4, 8), 26, 0)}, {}, "kind 26 are not read .*I32"),
        ({"a": ((4, 256), 15, 0)}, {}, "kind 15 are not read .*Q8_K"),
        ({"a" * 600: ((4, 8), 0, 0)}, {}, "a count of 600 where 512"),
        ({"a": ((), 0, 0)}, {}, "has 0 dimensions"),
        ({"a": ((1,) * 5, 0, 0)}, {}, "has 5 dimensions"),
    ],
)
def test_crooked_tensors_are_refused_at_opening(tensors, entries, message, tmp_path):
    path = crafted(tmp_path, tensors, bytes(256), entries)
    with pytest.raises(InputError, match=message) as caught:
        gguf_file.read(path)
    assert "\n" not in str(caught.value)


def text(value: str) -> bytes:
    return struct.pack("<I", 8) + string(value)


NUMBERS = struct.pack("<IIQ3I", 9, 4, 3, 1, 2, 3)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"split.count": struct.pack("<IH", 2, 3)}, "'split.count'.* one of 3 files; join them"),
        ({"split.count": NUMBERS}, r"'split.count'.* array\(\[1, 2, 3\]"),
        ({"general.architecture": NUMBERS}, r"'general.architecture'.* array\(\[1, 2, 3\]"),
        ({"general.alignment": NUMBERS}, r"general.alignment is array\(\[1, 2, 3\]"),
        ({"llama.embedding_length": NUMBERS}, r"'embedding_length'.* it is \[1, 2, 3\]"),
    ],
)
def test_odd_metadata_is_refused(entries, message, tmp_path):
    path = crafted(tmp_path, {}, entries={"general.architecture": text("llama"), **entries})
    with pytest.raises(InputError, match=message):
        gguf.read_config(path)


def test_a_list_where_one_number_is_allowed_is_refused(tmp_path):
    sizes = ("embedding_length", "attention.head_count", "block_count", "context_length")
    entries = {f"llama.{name}": struct.pack("<II", 4, 32) for name in sizes}
    entries["llama.expert_count"] = struct.pack("<IIQ2I", 9, 4, 2, 0, 0)
    path = crafted(tmp_path, {}, entries={"general.architecture": text("llama"), **entries})
    with pytest.raises(InputError, match=r"'expert_count'.* it is \[0, 0\]"):
        gguf.read_config(path)


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
        assert file.tensors[name].kind.number == tensor.tensor_type
        assert file.tensors[name].shape == tuple(reversed(tensor.shape.tolist()))
    fields = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    for name, value in fields.items():
        ours = file.metadata[name]
        assert (ours.tolist() if isinstance(ours, np.ndarray) else ours) == value, name


def test_only_quantised_files_need_the_package(monkeypatch, small, params, smollm2):
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    assert_same(load(gguf.open_file(small, SMALL), targets(SMALL)), params)
    with pytest.raises(InputError, match=r"pip install 'l32jax\[gguf\]'"):
        gguf.open_file(smollm2, SMOLLM2_135M)


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        gguf.read_config(tmp_path / "nothing.gguf")
