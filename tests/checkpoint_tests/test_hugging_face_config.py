"""config.json of every release, and refusal of what is not implemented."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l32jax import presets
from l32jax.checkpoint.hugging_face_config import TokenIds, read_config, to_json
from l32jax.config import LlamaConfig
from l32jax.errors import InputError
from tests import golden

IDS = TokenIds(begin=128_000, stop=(128_001, 128_008, 128_009), pad=128_004)
TEXT = to_json(presets.LLAMA3_2_1B, IDS, np.float32)
VISION = to_json(presets.LLAMA3_2_11B_VISION, IDS, np.float32)
SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(content, directory) -> LlamaConfig:
    (directory / "config.json").write_text(json.dumps(content))
    return read_config(directory)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_round_trip_gives_the_preset(name, tmp_path):
    config = presets.preset(name)
    again = read(to_json(config, IDS, np.float32), tmp_path)
    if config.vision is not None:  # never tied in transformers: the export writes a copy
        config = replace(config, decoder=replace(config.decoder, tied_embedding=False))
    assert again == config


def test_without_a_tokenizer_a_vision_model_names_no_first_token():
    """transformers 5 refuses null there, and in text models takes 1 for what is absent."""
    nothing = TokenIds(begin=None, stop=(), pad=None)
    vision = to_json(presets.LLAMA3_2_11B_VISION, nothing, np.float32)
    assert "bos_token_id" not in vision["text_config"]
    assert to_json(presets.LLAMA3_2_1B, nothing, np.float32)["bos_token_id"] is None


def test_releases_4_and_5_spell_rope_differently(tmp_path):
    assert TEXT["rope_theta"] == 500_000 and TEXT["rope_scaling"] == SCALING
    new = {key: value for key, value in TEXT.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {"rope_theta": 500_000.0, **SCALING}
    assert read(new, tmp_path) == presets.LLAMA3_2_1B
    old = TEXT | {"rope_scaling": {**SCALING, "type": "llama3"}}
    assert read(old, tmp_path) == presets.LLAMA3_2_1B
    for plain in (None, {"rope_type": "default"}, {"type": "default"}):
        assert read(TEXT | {"rope_scaling": plain}, tmp_path).decoder.rope_scaling is None


@pytest.mark.parametrize("model", ["text", "vision"])
def test_configs_that_releases_saved_mean_the_same(model, tmp_path):
    """Written by transformers 4.45.2, 4.57.6 and 5.23.0 themselves, by `save_pretrained`."""
    saved = golden.document("hugging_face_configs.json")
    assert list(saved) == ["4.45.2", "4.57.6", "5.23.0"]
    first, *others = (read(release[model], tmp_path) for release in saved.values())
    assert others == [first, first]
    assert first.decoder.rope_scaling == presets.LLAMA3_2_1B.decoder.rope_scaling
    assert (first.vision is not None) == (model == "vision")


def test_optional_keys_have_transformers_defaults(tmp_path):
    content = {key: value for key, value in TEXT.items() if key != "head_dim"}
    assert read(content, tmp_path) == presets.LLAMA3_2_1B
    del content["num_key_value_heads"]
    assert read(content, tmp_path).decoder.num_kv_heads == 32


@pytest.mark.parametrize(
    ("cross", "pattern"),
    [
        ([3, 8, 13, 18, 23, 28, 33, 38], ("self", "self", "self", "cross", "self")),
        (list(range(1, 40, 2)), ("self", "cross")),
        ([0, 20], ("cross", *["self"] * 19)),
        ([7], (*["self"] * 7, "cross", *["self"] * 32)),
    ],
)
def test_group_pattern_is_the_shortest_that_repeats(cross, pattern, tmp_path):
    text = VISION["text_config"] | {"cross_attention_layers": cross}
    decoder = read(VISION | {"text_config": text}, tmp_path).decoder
    assert decoder.group_pattern == pattern
    assert decoder.num_layers == 40


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "type"),
        ({"rope_scaling": {**SCALING, "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_scaling": {**SCALING, "factor": "8"}}, "factor"),
        ({"rope_theta": None}, "rope_theta"),
        ({"model_type": "mistral"}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"hidden_size": 2049}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"num_key_value_heads": 5}, "num_heads=32"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, named, tmp_path):
    with pytest.raises(InputError, match=named) as caught:
        read(TEXT | change, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("vision_config", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("vision_config", {"max_num_tiles": 6}, "max_num_tiles"),
        ("vision_config", {"supported_aspect_ratios": [[1, 1]]}, "supported_aspect_ratios"),
        ("vision_config", {"intermediate_layers_indices": [3, 40]}, "taps"),
        ("vision_config", {"vision_output_dim": 1280}, "vision_output_dim"),
        ("vision_config", {"image_size": [448, 560]}, "image_size"),
        ("vision_config", {"attention_heads": 7}, "hidden_size"),
        ("text_config", {"cross_attention_layers": [40]}, "cross_attention_layers"),
        ("text_config", {"cross_attention_layers": []}, "cross_attention_layers"),
        ("text_config", {"head_dim": 64}, "head_dim"),
        ("text_config", {"dropout": 0.1}, "dropout"),
        ("text_config", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("text_config", {"surprise": 1}, "surprise"),
    ],
)
def test_vision_parts_are_refused_by_name_too(part, change, named, tmp_path):
    with pytest.raises(InputError, match=named):
        read(VISION | {part: VISION[part] | change}, tmp_path)
    with pytest.raises(InputError, match="image_token_index"):
        read(VISION | {"image_token_index": 5}, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part),
    max_leaves=5,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_gives_a_config_or_an_input_error(data, value, tmp_path):
    content = json.loads(json.dumps(data.draw(st.sampled_from([TEXT, VISION]))))
    part = data.draw(st.sampled_from([content, *(v for v in content.values() if type(v) is dict)]))
    part[data.draw(st.sampled_from([*part, "new"]))] = value
    try:
        assert isinstance(read(content, tmp_path), LlamaConfig)
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a":' * 99_999, b"9" * 9999])
def test_what_is_no_json_object_is_an_input_error(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json: not"):
        read_config(tmp_path)


def test_missing_config_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_config(tmp_path)
