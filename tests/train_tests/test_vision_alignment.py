"""SFT and DPO of a vision model, text among the pictures: what changes and what does not."""

import dataclasses

import jax
import numpy as np
import pytest

from l32jax import api
from l32jax.conversion.convert import save
from l32jax.generate.model import Model
from l32jax.model.parameters import flatten, trains
from l32jax.objective_config import Dpo, NextToken, Objective
from l32jax.presets import TINY_TEXT
from l32jax.recipes import SEEING
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.sharding import single_device_mesh
from tests.checkpoint_tests.weights import random_params
from tests.data_tests.pictures import png
from tests.lines import write_lines
from tests.train_tests.small import TINY_TEXT_SEEING as MODEL

QUESTIONS = ("Who are you?", "What is two and two?")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vision model in which nothing is zero, an instruct trunk, dialogs, and comparisons."""
    home = tmp_path_factory.mktemp("aligned")
    tokenizer = api.load("tiny-text").require_tokenizer()
    trunk = Model(TINY_TEXT, random_params(TINY_TEXT, seed=1), tokenizer, single_device_mesh())
    save(trunk, home / "instruct", to="orbax")
    seeing = tokenizer.with_image_token()
    model = Model(MODEL, random_params(MODEL), seeing, single_device_mesh())
    save(model, home / "vision", to="orbax")
    (home / "a.png").write_bytes(png(40, 28))
    asked = {"image": "a.png", "question": "What is it?"}
    write_lines(home / "seen.jsonl", [asked | {"answer": "Noise."}] * 20)
    write_lines(home / "read.jsonl", [{"question": "Who?", "answer": "Me."}] * 20)
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]
    compared = {"messages": [{"role": "user", "content": content}]}
    told = {"chosen": "Noise.", "rejected": "A dog!"}
    write_lines(home / "seen_pairs.jsonl", [compared | told] * 20)
    write_lines(
        home / "read_pairs.jsonl", [{"prompt": "Who?", "chosen": "Me.", "rejected": "No"}] * 20
    )
    return home


def stage(folder, objective: Objective, num_steps: int) -> StageConfig:
    kind = "" if isinstance(objective, NextToken) else "_pairs"
    sources = [str(folder / f"{what}{kind}.jsonl") for what in ("seen", "read")]
    return StageConfig(
        name=objective.kind,
        num_steps=num_steps,
        trains=SEEING,
        data=DataConfig(
            mixture=tuple((source, 0.5) for source in sources),
            batch_size=4,
            length=96,
            max_images=2,
            max_pairs=2 if kind else 0,
        ),
        objective=objective,
        optimizer=OptimizerConfig(peak_lr=3e-3),
    )


@pytest.fixture(scope="module")
def runs(folder, one_device):
    """What the run begins with, what SFT makes of it, and what DPO makes of that."""
    sft, dpo = stage(folder, NextToken(), 12), stage(folder, Dpo(reference="ema"), 12)
    first = TrainConfig(
        model=MODEL,
        stages=(sft,),
        directory=str(folder / "sft"),
        start_from=str(folder / "vision"),
        trunk_from=str(folder / "instruct"),
    )
    second = dataclasses.replace(
        first,
        stages=(dpo,),
        directory=str(folder / "dpo"),
        start_from=first.directory,
        trunk_from=None,
    )
    begun = api._beginning(first, single_device_mesh())
    return [begun, api.run(first), api.run(second)]


def test_the_swapped_trunk_keeps_every_bit_and_all_that_sees_moves(runs):
    trunk = flatten(random_params(TINY_TEXT, seed=1))
    is_seeing = trains(SEEING, MODEL)
    before = flatten(runs[0].params)
    for run in runs[1:]:
        after = flatten(run.params)
        moved = {path for path in before if not np.array_equal(before[path], after[path])}
        assert moved == set(filter(is_seeing, before))
        before = after
    fixed = [np.asarray(leaf) for path, leaf in before.items() if not is_seeing(path)]
    assert sum(leaf.size for leaf in fixed) == sum(leaf.size for leaf in trunk.values())


def test_what_is_said_to_text_alone_stays_to_the_bit(runs):
    for question in QUESTIONS:
        tokens, images = runs[0].encode(question)
        first, *others = (run.logits(tokens, images) for run in runs)
        assert all(np.array_equal(first, other) for other in others)


def answer_logs(run: Model, folder, answer: str, picture: str | None) -> float:
    """The log-probability of an answer to the question that was trained on."""
    pictures = [] if picture is None else [folder / picture]
    asked, images = run.encode("What is it?" if pictures else "Who?", pictures)
    said = run.require_tokenizer().encode(answer)
    logs = jax.nn.log_softmax(run.logits([*asked, *said], images))
    return float(sum(logs[len(asked) - 1 + n, token] for n, token in enumerate(said)))


def test_answers_about_pictures_go_where_they_are_sent(runs, folder):
    begun, sft, dpo = (answer_logs(run, folder, "Noise.", "a.png") for run in runs)
    assert sft > begun + 5
    _, before, after = (
        answer_logs(run, folder, "Noise.", "a.png") - answer_logs(run, folder, "A dog!", "a.png")
        for run in runs
    )
    assert after > before + 1 and dpo > begun
    told = [answer_logs(run, folder, "Me.", None) for run in runs]
    assert told[0] == told[1] == told[2]
