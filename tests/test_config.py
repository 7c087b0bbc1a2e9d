"""Configs: overrides are typed, mistakes are named, and JSON gives back what it was given."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.config import (
    Compat,
    DecoderConfig,
    LlamaConfig,
    LoraConfig,
    MeshConfig,
    RopeScaling,
    VisionConfig,
)
from l32jax.config_text import changed_fields, from_json, override, to_json
from l32jax.errors import InputError
from l32jax.presets import PRESETS, TINY_TEXT, TINY_VISION
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig

STAGE = StageConfig(
    name="one",
    num_steps=10,
    trains=("language_model",),
    data=DataConfig(mixture=(("a.jsonl", 0.5), ("b.jsonl", 1.5)), batch_size=4, length=16),
    optimizer=OptimizerConfig(peak_lr=1e-3),
)
RUN = TrainConfig(
    model=TINY_VISION,
    stages=(STAGE, dataclasses.replace(STAGE, name="two")),
    directory="run",
    mesh=MeshConfig(),
)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("directory=some/where=else", ("directory",), "some/where=else"),
        ("directory=12", ("directory",), "12"),
        ("tokenizer=tokenizer.model", ("tokenizer",), "tokenizer.model"),
        ("tokenizer=None", ("tokenizer",), None),
        ("dtype=bfloat16", ("dtype",), "bfloat16"),
        ("mesh.data=2", ("mesh", "data"), 2),
        ("mesh.fsdp=-1", ("mesh", "fsdp"), -1),
        ("stages.1.num_steps=7", ("stages", 1, "num_steps"), 7),
        ("stages.0.optimizer.peak_lr=1", ("stages", 0, "optimizer", "peak_lr"), 1.0),
        ("stages.0.optimizer.peak_lr=3e-4", ("stages", 0, "optimizer", "peak_lr"), 3e-4),
        ("stages.0.trains=('adapter',)", ("stages", 0, "trains"), ("adapter",)),
        ("stages.0.data.mixture=[('x', 1)]", ("stages", 0, "data", "mixture"), (("x", 1.0),)),
        ("model.decoder.rope_scaling=None", ("model", "decoder", "rope_scaling"), None),
        (
            "model.decoder.rope_scaling.factor=8",
            ("model", "decoder", "rope_scaling", "factor"),
            8.0,
        ),
        ("model.decoder.tied_embedding=False", ("model", "decoder", "tied_embedding"), False),
        ("model.compat.row_mask=hf", ("model", "compat", "row_mask"), "hf"),
    ],
)
def test_override_changes_one_field_and_nothing_else(assignment, path, value):
    changed = override(RUN, assignment)
    expected = plain(RUN)
    *inner, last = path
    place = expected
    for key in inner:
        place = place[key]
    place[last] = plain(value)
    assert plain(changed) == expected
    found = changed
    for key in path:
        found = found[key] if isinstance(key, int) else getattr(found, key)
    assert found == value and type(found) is type(value)


def plain(config):
    """As JSON has it: dicts and lists."""
    value = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "not of the form path=value"),
        ("sed=3", "TrainConfig has no field 'sed'; did you mean 'seed'?"),
        (
            "model.decoder.rope_tehta=1.0",
            "DecoderConfig has no field 'rope_tehta'; did you mean 'rope_theta'?",
        ),
        ("mesh.qqqq=1", "MeshConfig has no field 'qqqq'; known: data, fsdp, context, tensor"),
        ("seed.more=3", "seed of TrainConfig has no parts"),
        ("tokenizer.more=3", "tokenizer of TrainConfig has no parts"),
        ("seed=three", "seed='three' is a str"),
        ("seed=1.5", "seed=1.5 is a float"),
        ("seed=True", "seed=True is a bool"),
        ("seed=", "seed='' is a str"),
        ("dtype=float16", "dtype='float16' must be one of 'float32', 'bfloat16'"),
        ("stages.2.num_steps=7", "needs an index below 2"),
        ("stages.one.num_steps=7", "needs an index below 2"),
        ("stages.-1.num_steps=7", "needs an index below 2"),
        ("stages.²=7", "needs an index below 2"),
        ("stages.0=7", "needs an index below 2"),
        ("stages.0.trains=adapter", "trains='adapter' is a str"),
        ("stages.0.trains=('adaptor',)", "'adaptor' must be one of"),
        ("stages.0.data.mixture.0.x=1", "mixture"),
        ("stages.0.data.mixture=[('x', 1, 2)]", "needs 2 values, not 3"),
        ("model.decoder.num_kv_heads=3", "num_heads=4 must be a multiple of num_kv_heads=3"),
        ("model.decoder.num_kv_heads=0", "num_kv_heads=0"),
        ("model.decoder.head_dim=5", "head_dim=5 must be even"),
        ("model.vision.patch_size=15", "must be a multiple of patch_size=15"),
        ("model.vision.patch_size=0", "patch_size=0"),
        ("model.vision.taps=(2, 1)", "taps=(2, 1) must be increasing"),
        ("model.vision.taps=(1, 3)", "below num_local_layers=3"),
        ("model.vision.taps=()", "taps=()"),
        ("model.vision=None", "disagree"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(assignment, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        override(RUN, assignment)
    assert "\n" not in str(caught.value)


def test_changed_fields_are_those_of_an_override():
    before = to_json(RUN)
    assert changed_fields(before, RUN) == []
    changed = override(override(RUN, "stages.0.num_steps=77"), "start_from=here")
    was = RUN.stages[0].num_steps
    assert sorted(changed_fields(before, changed)) == [
        f"stages.0.num_steps=77 (was {was})",
        f"start_from=here (was {RUN.start_from})",
    ]
    shorter = changed_fields(before, dataclasses.replace(RUN, stages=RUN.stages[:1]))
    assert shorter and all(field.startswith("stages.1.") for field in shorter)


@pytest.mark.parametrize("config", [RUN, *PRESETS.values()])
def test_json_round_trip_is_exact(config):
    assert from_json(type(config), to_json(config)) == config


def test_json_of_before_lora_is_still_read():
    content = json.loads(to_json(RUN))
    del content["trunk_from"]
    for part in ("decoder", "vision"):
        if content["model"][part] is not None:
            del content["model"][part]["lora"]
    assert from_json(TrainConfig, json.dumps(content)) == RUN


def test_lora_is_given_field_by_field():
    run = override(override(RUN, "model.decoder.lora.rank=8"), "model.decoder.lora.alpha=4")
    assert run.model.decoder.lora == LoraConfig(rank=8, alpha=4.0)
    assert run.model.without_lora() == RUN.model


FINITE = st.floats(allow_nan=False, allow_infinity=False)
SMALL = st.integers(1, 9)


@st.composite
def runs(draw):
    """Every field of a run drawn, where nothing else depends on it."""
    optimizer = draw(
        st.builds(
            OptimizerConfig,
            peak_lr=FINITE,
            final_lr=FINITE,
            warmup_steps=SMALL,
            schedule=st.sampled_from(["cosine", "linear", "constant"]),
            weight_decay=FINITE,
        )
    )
    data = draw(
        st.builds(
            DataConfig,
            mixture=st.lists(st.tuples(st.text(max_size=5), FINITE), max_size=3).map(tuple),
            batch_size=SMALL,
            length=SMALL,
            max_images=SMALL,
        )
    )
    parts = st.sampled_from(["language_model", "vision_tower", "adapter"])
    stages = st.builds(
        StageConfig,
        name=st.text(max_size=8),
        num_steps=SMALL,
        trains=st.lists(parts, unique=True).map(tuple),
        data=st.just(data),
        optimizer=st.just(optimizer),
    )
    return draw(
        st.builds(
            TrainConfig,
            model=st.sampled_from(list(PRESETS.values())),
            stages=st.lists(stages, max_size=2).map(tuple),
            directory=st.text(max_size=8),
            tokenizer=st.none() | st.text(max_size=8),
            start_from=st.none() | st.text(max_size=8),
            mesh=st.builds(MeshConfig, data=SMALL, tensor=SMALL),
            seed=st.integers(0, 2**40),
            dtype=st.sampled_from(["float32", "bfloat16"]),
        )
    )


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # beartype does
@given(runs())
def test_json_round_trip_is_exact_for_any_run(run):
    again = from_json(TrainConfig, to_json(run))
    assert again == run
    assert to_json(again) == to_json(run)
    assert hash(again) == hash(run)  # configs are static arguments of compiled functions


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda run: run.update(sed=3), "TrainConfig has no field 'sed'; did you mean 'seed'?"),
        (
            lambda run: run["stages"][1]["data"].update(lenght=3),
            "TrainConfig.stages.1.data has no field 'lenght'; did you mean 'length'?",
        ),
        (lambda run: run["model"]["decoder"].pop("embed_dim"), "embed_dim"),
        (lambda run: run.update(seed="3"), "TrainConfig.seed='3' is a str"),
        (lambda run: run.update(stages={}), "TrainConfig.stages={} is a dict"),
        (lambda run: run["stages"][0]["trains"].append("all"), "'all' must be one of"),
        (lambda run: run["model"].update(decoder=None), "TrainConfig.model.decoder=None"),
        (lambda run: run.update(dtype=["float32"]), "TrainConfig.dtype=['float32'] must be one of"),
        (lambda run: run["model"]["decoder"].update(num_kv_heads=0), "num_kv_heads=0"),
    ],
)
def test_json_of_another_shape_is_refused_by_field(edit, message):
    document = json.loads(to_json(RUN))
    edit(document)
    with pytest.raises(InputError, match=re.escape(message)):
        from_json(TrainConfig, json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[]", "3", "null"])
def test_what_is_not_a_config_is_an_input_error(text):
    with pytest.raises(InputError, match="TrainConfig"):
        from_json(TrainConfig, text)


def test_cross_attention_and_an_image_encoder_need_each_other():
    with pytest.raises(InputError, match="disagree"):
        LlamaConfig(decoder=TINY_VISION.decoder)
    with pytest.raises(InputError, match="disagree"):
        LlamaConfig(decoder=TINY_TEXT.decoder, vision=TINY_VISION.vision)


def test_layers_are_counted_by_kind():
    decoder = TINY_VISION.decoder
    assert (decoder.num_layers, decoder.count("self"), decoder.count("cross")) == (5, 4, 1)
    assert isinstance(decoder, DecoderConfig)
    assert Compat.like("hf") == Compat(row_mask="hf", vision_intermediates="hf")


def test_sizes_that_follow_from_others():
    vision = VisionConfig(image_size=560)
    assert (vision.grid, vision.tokens_per_tile, vision.feature_dim) == (40, 1601, 7680)
    assert RopeScaling(factor=32.0).original_context == 8192
