"""Tiny checkpoints in the layout of Meta's quantised 1B and 3B, made of known numbers."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from l32jax.checkpoint import meta_files, meta_quantised, torch_file
from l32jax.checkpoint.engine.slices import load
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.transfer import write
from l32jax.checkpoint.fields import Fields
from l32jax.checkpoint.meta_quantised import Scheme
from l32jax.errors import InputError
from tests import golden
from tests.checkpoint_tests.test_meta import weights
from tests.checkpoint_tests.test_meta_files import TEXT
from tests.checkpoint_tests.weights import targets

GROUP, RANK, SCALE = 16, 4, 2.0
PLAIN = Scheme(None, rotated=False)
SPINQUANT = {"quantization_args": {"group_size": 256}}
QLORA = SPINQUANT | {"lora_args": {"rank": RANK, "scale": SCALE}}
W1, W2, WQ = (
    f"layers.1.{name}." for name in ("feed_forward.w1", "feed_forward.w2", "attention.wq")
)


def integers(matrix: np.ndarray, group: int, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Rounded to whole numbers, with the scale of each group of a row."""
    groups = matrix.reshape(len(matrix), -1, group)
    scales = np.abs(groups).max(-1, keepdims=True) / largest
    values = np.clip(np.round(groups / scales), -np.ceil(largest), np.floor(largest))
    return values.astype(np.int8).reshape(matrix.shape), scales[..., 0]


def quantise(arrays: dict[str, np.ndarray], *, adaptors: bool = False) -> dict[str, np.ndarray]:
    """A whole checkpoint: blocks in int4 by groups, embedding and head in int8 by rows."""
    random = np.random.default_rng(0)
    result = {}
    for name, array in arrays.items():
        if array.ndim < 2:
            result[name] = array
            continue
        prefix = name.removesuffix("weight")
        in_block = name.startswith("layers.")
        group = GROUP if in_block else array.shape[1]
        result[name], scales = integers(array, group, 7.5 if in_block else 127)
        result[f"{prefix}scales"] = scales
        if adaptors and in_block:
            outs, ins = array.shape
            result[f"{prefix}adaptor.A.weight"] = random.standard_normal((RANK, ins), np.float32)
            result[f"{prefix}adaptor.B.weight"] = random.standard_normal((outs, RANK), np.float32)
    return result


def dense(stored: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """What a matrix means, in float64 and number by number."""
    weight, scales = stored[f"{prefix}weight"], stored[f"{prefix}scales"].astype(np.float64)
    scales = scales.reshape(len(weight), -1)
    result = weight * np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1)
    if f"{prefix}adaptor.A.weight" in stored:
        a, b = (stored[f"{prefix}adaptor.{part}.weight"].astype(np.float64) for part in "AB")
        result += SCALE * (b @ a)
    return result


def dequantised(stored, scheme) -> Source:
    return meta_quantised.dequantised(Source.of(stored, "test"), scheme)


def save(path, stored, extra):
    """Needs torch, as our own writer has no int8."""
    torch = pytest.importorskip("torch")
    path.mkdir()
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in stored.items()}
    torch.save(tensors, path / "consolidated.00.pth")
    (path / "params.json").write_text(json.dumps(TEXT | extra))
    return path


@pytest.fixture(scope="module")
def plain():
    return quantise(weights("llama_tiny_meta"))


@pytest.fixture(scope="module")
def adapted():
    return quantise(weights("llama_tiny_meta"), adaptors=True)


def test_groups_have_the_values_of_torchao():
    """Golden: torchao 0.7's int4 in groups of 32, as its quantisation-aware training rounds."""
    arrays = golden.arrays("quant_torchao07")
    scales = arrays["w_scale"]
    stored = np.round(arrays["w_fake"] / np.repeat(scales, 32, axis=1)).astype(np.int8)
    assert stored.min() >= -8 and stored.max() <= 7
    source = dequantised({"w.weight": stored, "w.scales": scales}, PLAIN)
    np.testing.assert_array_equal(source.read("w.weight", slice(None)), arrays["w_fake"])


@pytest.mark.parametrize("prefix", [W1, W2, WQ, "tok_embeddings.", "output."])
def test_every_number_is_multiplied_by_its_groups_scale(prefix, plain):
    source = dequantised(plain, PLAIN)
    name = f"{prefix}weight"
    tensor = source.tensors[name]
    assert (tensor.shape, tensor.dtype) == (plain[name].shape, np.float32)
    values = source.read(name, slice(None))
    np.testing.assert_allclose(values, dense(plain, prefix), rtol=1e-6)
    for rows in (slice(0, 3), slice(10, 11), slice(30, 32), slice(5, 5)):
        np.testing.assert_array_equal(source.read(name, rows), values[rows])


def test_scales_of_rows_may_have_one_dimension_or_two(plain):
    name = "tok_embeddings.weight"
    wide = dequantised(plain, PLAIN).read(name, slice(None))
    assert plain["tok_embeddings.scales"].ndim == 2
    flat = plain | {"tok_embeddings.scales": plain["tok_embeddings.scales"][:, 0]}
    np.testing.assert_array_equal(dequantised(flat, PLAIN).read(name, slice(None)), wide)


def test_zeros_are_subtracted_if_they_are_there(plain):
    zeros = np.round(3 * np.random.default_rng(0).standard_normal(plain[f"{W1}scales"].shape))
    source = dequantised(plain | {f"{W1}zeros": zeros}, PLAIN)
    moved = plain[f"{W1}weight"] - np.repeat(zeros, GROUP, axis=1)
    expected = dense(plain | {f"{W1}weight": moved}, W1)
    np.testing.assert_allclose(source.read(f"{W1}weight", slice(None)), expected, rtol=1e-6)
    assert f"{W1}zeros" not in source.tensors


@pytest.mark.parametrize("prefix", [W1, W2, WQ])
def test_adaptors_are_merged(prefix, adapted):
    source = dequantised(adapted, Scheme((RANK, SCALE), rotated=False))
    assert not [name for name in source.tensors if "adaptor" in name or "scales" in name]
    values = source.read(f"{prefix}weight", slice(None))
    np.testing.assert_allclose(values, dense(adapted, prefix), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(source.read(f"{prefix}weight", slice(7, 9)), values[7:9])


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 128, 1024])
def test_rotation_is_that_of_hadamards_matrix(size):
    values = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
    matrix = scipy.linalg.hadamard(size) / np.sqrt(size)
    rotated = meta_quantised.rotated(values)
    assert rotated.dtype == np.float32
    np.testing.assert_allclose(rotated, values.astype(np.float64) @ matrix, atol=1e-5)
    np.testing.assert_allclose(meta_quantised.rotated(rotated), values, atol=1e-5)


@given(st.integers(0, 10), st.integers(0, 2**32))
def test_rotation_keeps_lengths(exponent, seed):
    values = np.random.default_rng(seed).standard_normal((2, 1 << exponent)).astype(np.float32)
    lengths = np.linalg.norm(meta_quantised.rotated(values), axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(values, axis=1), rtol=1e-5)


def test_only_the_mlps_second_matrix_is_rotated_back(plain):
    """The activations x of a rotated model become H x: W' (H x) is W x with W = W' H."""
    source = dequantised(plain, Scheme(None, rotated=True))
    for prefix in (W1, WQ, "output."):
        values = source.read(f"{prefix}weight", slice(None))
        np.testing.assert_allclose(values, dense(plain, prefix), rtol=1e-6)
    weight = source.read(f"{W2}weight", slice(None))
    x = np.random.default_rng(1).standard_normal(256)
    turned = scipy.linalg.hadamard(256) @ x / 16
    np.testing.assert_allclose(weight @ x, dense(plain, W2) @ turned, atol=1e-5)


@pytest.mark.parametrize(("extra", "adaptors"), [(SPINQUANT, False), (QLORA, True)])
def test_folder_is_read_as_a_model_of_its_own(extra, adaptors, tmp_path):
    stored = quantise(weights("llama_tiny_meta"), adaptors=adaptors)
    folder = save(tmp_path / "m", stored, extra)
    config, slices, _ = meta_files.open_folder(folder)
    decoder = dataclasses.replace(golden.TEXT.decoder, max_context=8192)
    assert config == dataclasses.replace(golden.TEXT, decoder=decoder)
    params = load(slices, targets(config))
    down = params["decoder"]["groups"]["blocks"][0]["mlp"]["down"]["weight"][1]
    expected = dense(stored, W2)
    if not adaptors:
        expected = expected @ scipy.linalg.hadamard(256) / 16
    np.testing.assert_allclose(down, expected, rtol=1e-4, atol=2e-5)
    query = params["decoder"]["groups"]["blocks"][0]["attention"]["query"]["weight"][1]
    pairs = dense(stored, WQ).reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(4, 16, 64)
    np.testing.assert_allclose(query, pairs, rtol=1e-4, atol=2e-5)


def test_head_that_was_rounded_like_the_embedding_is_tied(plain, tmp_path):
    for part in ("weight", "scales"):
        plain = plain | {f"output.{part}": plain[f"tok_embeddings.{part}"]}
    config = meta_files.open_folder(save(tmp_path / "m", plain, SPINQUANT)).config
    assert config.decoder.tied_embedding


def test_plain_numbers_come_out_close_to_what_was_rounded(tmp_path):
    """int4 of groups of 16 is a coarse model, but the same model."""
    arrays = weights("llama_tiny_meta")
    spun = arrays | {
        name: meta_quantised.rotated(array)
        for name, array in arrays.items()
        if name.endswith("w2.weight")
    }
    folder = save(tmp_path / "m", quantise(spun), SPINQUANT)
    config, slices, _ = meta_files.open_folder(folder)
    exported = tmp_path / "exported"
    write(meta_files.plan(slices, config, tokenizer=None, about={}), exported, {})
    again = meta_files.open_folder(exported)
    assert again.config == config and not again.notes
    source = torch_file.open_file(exported / "consolidated.00.pth")
    for name, array in arrays.items():
        error = np.abs(source.read(name, slice(None)) - array).max() / np.abs(array).max()
        assert error < 0.1, name


def test_the_user_is_told_what_is_not_kept(plain, adapted, tmp_path):
    (spun,) = meta_files.open_folder(save(tmp_path / "spun", plain, SPINQUANT)).notes
    assert "int4 and int8 weights and their rotations are read as plain float32" in spun
    (merged,) = meta_files.open_folder(save(tmp_path / "merged", adapted, QLORA)).notes
    assert "their adaptors are read" in merged and "activations rounded to int8" in merged


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, None),
        (SPINQUANT, Scheme(None, rotated=True)),
        (QLORA, Scheme((RANK, SCALE), rotated=False)),
        ({"quantization_args": {"spinquant": False}}, PLAIN),
        ({"quantization_args": {"spinquant": True}}, Scheme(None, rotated=True)),
        ({"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation",
                                "spinquant": True}, "lora_args": {"rank": 1, "scale": 1}},
         Scheme((1, 1.0), rotated=True)),
    ],
)  # fmt: skip
def test_params_say_how_it_is_quantised(params, expected):
    fields = Fields(params, "params.json")
    assert meta_quantised.scheme(fields) == expected
    fields.close()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"quantization_args": {"scheme": "fp8"}}, "'scheme' in .*: it is 'fp8', expected"),
        ({"quantization_args": {"bits": 2}}, r"'bits' in .*, quantization_args: this key"),
        ({"quantization_args": 4}, "quantization_args: expected a JSON object"),
        ({"quantization_args": {}, "lora_args": {"rank": 0, "scale": 1}}, "'rank' in .*: it is 0"),
        ({"quantization_args": {}, "lora_args": {"rank": 2}}, "'scale' in .*: it is absent"),
    ],
)
def test_other_schemes_are_refused(params, message):
    with pytest.raises(InputError, match=message):
        meta_quantised.scheme(Fields(params, "params.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{W1}weight": None}, "w1.weight' is missing, a part of a quantised matrix"),
        ({f"{W1}weight": np.ones((256, 64), np.float32)}, r"is float32\[256, 64\], expected int8"),
        ({f"{W1}weight": np.ones(256, np.int8)}, r"is int8\[256\], expected int8 of two"),
        ({f"{W1}scales": np.ones((255, 4))}, r"w1.scales' .* is float64\[255, 4\], expected a num"),
        ({f"{W1}scales": np.ones((256, 5))}, "equal parts of each of 256 rows of 64"),
        ({f"{W1}scales": np.ones((256, 0))}, "equal parts"),
        ({f"{W1}scales": np.ones(())}, "equal parts"),
        ({f"{W1}scales": np.ones((256, 2, 2))}, "equal parts"),
        ({f"{W1}zeros": np.ones((256, 2))}, r"w1.zeros' .*, expected the shape \[256, 4\]"),
        ({f"{W1}adaptor.A.weight": None}, "w1.adaptor.A.weight' is missing"),
        ({f"{W1}adaptor.A.weight": np.ones((5, 64))}, r"expected the shape \[4, 64\]"),
        ({f"{W1}adaptor.B.weight": np.ones((64, 4))}, r"expected the shape \[256, 4\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message, adapted):
    stored = {k: v for k, v in (adapted | change).items() if v is not None}
    with pytest.raises(InputError, match=message) as caught:
        dequantised(stored, Scheme((RANK, SCALE), rotated=False))
    assert "\n" not in str(caught.value)


def test_rotations_of_odd_sizes_are_refused():
    stored = {f"{W2}weight": np.ones((4, 96), np.int8), f"{W2}scales": np.ones((4, 1))}
    with pytest.raises(InputError, match="expected a power of two of columns"):
        dequantised(stored, Scheme(None, rotated=True))


def test_adaptors_that_nobody_announced_have_no_place(adapted, tmp_path):
    folder = save(tmp_path / "m", adapted, SPINQUANT)
    with pytest.raises(InputError, match=r"adaptor.A.weight' of shape .* has no place"):
        meta_files.open_folder(folder)


def test_quantised_ranks_are_refused(plain, tmp_path):
    folder = save(tmp_path / "m", plain, SPINQUANT)
    content = (folder / "consolidated.00.pth").read_bytes()
    (folder / "consolidated.01.pth").write_bytes(content)
    with pytest.raises(InputError, match="read from one file only, not from 2"):
        meta_files.open_folder(folder)
