"""Stages that cannot be are refused where they are written."""

import dataclasses
import math
import re
from functools import partial

import pytest

from l32jax.config_text import changed_fields, override, to_json
from l32jax.errors import InputError
from l32jax.objective_config import Distill, Dpo, Grpo, Reward, Teacher
from l32jax.run_config import OptimizerConfig, TrainConfig
from tests.train_tests.small import MODEL, TEXT, stage

RUN = TrainConfig(model=MODEL, stages=(stage(("adapter",)),) * 4, directory="run")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.0.num_steps=0", "num_steps=0 must be at least 1"),
        ("stages.0.accumulate=0", "accumulate=0 must be at least 1"),
        ("stages.0.accumulate=3", "accumulate=3 of stage 'small': batch_size=4 must be a multiple"),
        ("stages.0.average_every=0", "average_every=0 must be at least 1"),
        ("stages.0.average=mean", "average='mean' must be one of 'none', 'ema', 'polyak'"),
        ("stages.0.ema_decay=1", "ema_decay=1.0 of stage 'small' must be a share below 1"),
        ("stages.0.average_from=-0.1", "average_from=-0.1 of stage 'small' must be a share"),
        ("stages.0.z_loss=-1", "z_loss=-1.0 of stage 'small' must not be negative"),
        ("stages.0.image_size=0", "image_size=0 must be at least 1"),
        ("stages.0.image_size=30", "image_size=30 must be a multiple of patch_size=14"),
        ("stages.0.optimizer.kind=sgd", "kind='sgd' must be one of"),
        ("stages.0.optimizer.beta1=1", "beta1=1.0 must be below 1"),
        ("params=float16", "params='float16' must be one of"),
        ("keep=0", "keep=0 must be at least 1"),
    ],
)
def test_an_impossible_run_says_what_is_wrong(assignment, message):
    with pytest.raises(InputError, match=re.escape(message)):
        override(RUN, assignment)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (partial(Teacher, model=MODEL, start_from="teacher"), "weight"),
        (partial(Distill, top_k=4), "temperature"),
        (partial(Distill, top_k=4), "beta"),
        (partial(Distill, top_k=4), "share"),
        (Dpo, "beta"),
        (Dpo, "nll"),
        (Dpo, "ema_decay"),
        (Reward, "margin"),
        (Reward, "l2"),
        (Grpo, "clip"),
        (Grpo, "kl"),
        (Grpo, "temperature"),
        (Grpo, "ema_decay"),
    ],
)
def test_an_impossible_objective_says_what_is_wrong(objective, name, value):
    objective()
    with pytest.raises(InputError, match=rf"\b{name}={value}"):
        objective(**{name: value})


LARGER = dataclasses.replace(
    MODEL, vision=dataclasses.replace(MODEL.vision, image_size=2 * MODEL.vision.image_size)
)
OTHER_WORDS = dataclasses.replace(
    TEXT, decoder=dataclasses.replace(TEXT.decoder, vocab_size=2 * TEXT.decoder.vocab_size)
)


@pytest.mark.parametrize(
    ("teacher", "images", "message"),
    [
        (OTHER_WORDS, 0, "teacher 'wise' of stage 'small': it knows 1024 words, and the model 512"),
        (TEXT, 1, "it reads text only, and rows have images"),
        (LARGER, 1, "its tiles are of another size or number"),
    ],
)
def test_a_teacher_that_cannot_read_the_rows_is_told(teacher, images, message):
    told = Distill(teachers=(Teacher(model=teacher, start_from="wise"),))
    learning = stage(("adapter",))
    data = dataclasses.replace(learning.data, max_images=images)
    learning = dataclasses.replace(learning, data=data, objective=told)
    with pytest.raises(InputError, match=re.escape(message)):
        TrainConfig(model=MODEL, stages=(learning,), directory="run")


@pytest.mark.parametrize(
    ("objective", "data", "message"),
    [
        (
            Distill(teachers=(Teacher(model=MODEL, start_from="wise"),)),
            {"features": "seen"},
            "features='seen' of stage 'small': teachers see images by their own",
        ),
        (Distill(top_k=4), {"mirror_images": True}, "mirror_images of stage 'small': what models"),
        (
            Dpo(reference="data"),
            {"mirror_images": True, "max_pairs": 1},
            "mirror_images of stage 'small': what models",
        ),
    ],
)
def test_targets_are_of_the_images_that_are_seen(objective, data, message):
    learning = stage(("adapter",))
    seen = dataclasses.replace(learning.data, max_images=1, **data)
    with pytest.raises(InputError, match=re.escape(message)):
        dataclasses.replace(learning, data=seen, objective=objective)


def test_a_text_model_has_no_image_size():
    larger = dataclasses.replace(RUN.stages[0], image_size=42)
    with pytest.raises(InputError, match="the model has no image encoder; leave it out"):
        TrainConfig(model=TEXT, stages=(larger,), directory="run")


def test_an_image_size_stays_until_the_next_one():
    run = override(override(RUN, "stages.1.image_size=42"), "stages.3.image_size=14")
    sizes = [run.model_of(number).vision.image_size for number in range(4)]
    assert sizes == [MODEL.vision.image_size, 42, 42, 14]
    assert RUN.model_of(3) == MODEL
    assert dataclasses.replace(run, model=run.model_of(2)).model_of(2) == run.model_of(2)


def test_changes_of_the_new_fields_are_told():
    changed = override(override(RUN, "stages.1.average=ema"), "stages.1.optimizer.kind=muon")
    assert sorted(changed_fields(to_json(RUN), changed)) == [
        "stages.1.average=ema (was none)",
        "stages.1.optimizer.kind=muon (was adamw)",
    ]
    assert OptimizerConfig(peak_lr=1.0).kind == "adamw"
