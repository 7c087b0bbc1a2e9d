"""A reward model is asked what answers are worth, and measured by comparisons."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import l32jax
from l32jax.__main__ import main
from l32jax.align.judging import Judge
from l32jax.conversion.convert import save
from l32jax.data.batches import place
from l32jax.data.chat import Image, Message, encode_for_training
from l32jax.data.rows import VisionShape, make_row, stack
from l32jax.data.samples import Sample
from l32jax.errors import InputError
from l32jax.evaluate.reward import measured, preferences
from l32jax.generate.model import Model
from l32jax.model.llama import bind, forward_batch
from tests.checkpoint_tests.weights import random_params
from tests.conftest import CACHE
from tests.data_tests.pictures import png
from tests.lines import write_lines

ANSWERS = ["Yes.", "No, not at all, and never.", "", "Perhaps"] * 3  # more than one batch of them


def ranking(name: str) -> Model:
    model = l32jax.load(name)
    config = dataclasses.replace(model.config, reward_head=True)
    return Model(config, random_params(config), model.tokenizer, model.mesh)


@pytest.fixture(scope="module")
def judges() -> dict[str, Model]:
    return {name: ranking(name) for name in ("tiny-text", "tiny-vision")}


def by_hand(model: Model, dialog, images) -> float:
    """The head's product with the state of the last token, of a row with nothing else in it."""
    tokens, weights = encode_for_training(model.require_tokenizer(), dialog)
    vision = VisionShape.of(model.config, max_images=1, max_tiles=4) if images else None
    sample = Sample.single(tokens, weights, images)
    batch = stack([make_row([sample], length=len(tokens), vision=vision)])
    with jax.set_mesh(model.mesh):
        run = jax.jit(lambda p, b: forward_batch(bind(model.config, p), b).states)
        state = np.asarray(run(model.params, place(batch, model.mesh)))[0, -1]
    return float(state @ np.asarray(model.params["decoder"]["reward_head"]["weight"])[0])


@pytest.mark.parametrize("name", ["tiny-text", "tiny-vision"])
def test_a_reward_is_the_answers_own_whatever_it_is_asked_beside(judges, name):
    model, images = judges[name], [png(28, 60)] * (name == "tiny-vision")
    asked = (Message("user", (*map(Image, images), "Is it so?")),)
    found = Judge(model)(asked, images, ANSWERS)
    expected = [by_hand(model, (*asked, Message("assistant", a)), images) for a in ANSWERS[:4]]
    np.testing.assert_allclose(found, expected * 3, rtol=1e-4, atol=1e-5)
    assert len(set(np.round(expected, 3))) == 4


def test_a_model_without_a_head_judges_nothing():
    with pytest.raises(InputError, match="it has no reward head; train one"):
        Judge(l32jax.load("tiny-text"))


def test_comparisons_of_a_source_are_measured(judges, tmp_path):
    model, prompts = judges["tiny-text"], ["Why?", "Is it so?", "2 and 3?"]
    better, worse = ("Yes.", "No.", "Perhaps"), ("No, not at all.", "Yes!", "Never, never.")
    lines = [
        {"prompt": prompt, "chosen": good, "rejected": bad}
        for prompt, good, bad in zip(prompts, better, worse, strict=True)
    ]
    source = tmp_path / "pairs.jsonl"
    empty = {"prompt": "Why?", "chosen": "", "rejected": "So."}
    write_lines(source, [*lines, empty])
    found = preferences(model, str(source))
    judge = Judge(model)
    each = [judge((Message("user", line["prompt"]),), [], [line["chosen"]])[0] for line in lines]
    less = [judge((Message("user", line["prompt"]),), [], [line["rejected"]])[0] for line in lines]
    gaps = np.subtract(each, less)
    assert (found.pairs, found.bad) == (3, 1)
    assert found.accuracy == pytest.approx((gaps > 0).mean())
    assert found.loss == pytest.approx(np.log1p(np.exp(-gaps)).mean(), rel=1e-4)


def test_a_source_without_comparisons_is_an_input_error(judges, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "Gates open."}\n')
    with pytest.raises(InputError, match="no answers to compare; give comparisons"):
        preferences(judges["tiny-text"], str(tmp_path / "texts.jsonl"))


def test_what_is_told_of_differences():
    """Two of three surely right, and a draw."""
    sure = measured([50.0, 50.0, -50.0])
    assert (sure.pairs, sure.bad) == (3, 0)
    assert sure.accuracy == pytest.approx(2 / 3) and sure.loss == pytest.approx(50 / 3)
    assert sure.calibration == pytest.approx(1 / 3)
    draw = measured([0.0])
    assert (draw.accuracy, draw.calibration) == (0.5, 0.0)
    assert draw.loss == pytest.approx(np.log(2))


def test_one_that_knows_how_sure_it_may_be_has_no_calibration_error():
    sure = 0.8
    gap = np.log(sure / (1 - sure))
    assert measured([gap] * 8 + [-gap] * 2).calibration == pytest.approx(0, abs=1e-12)
    assert measured([gap] * 5 + [-gap] * 5).calibration == pytest.approx(0.3)


@pytest.fixture(scope="module")
def run_folder(judges, tmp_path_factory):
    """A reward model, and comparisons to judge."""
    home = tmp_path_factory.mktemp("judging")
    save(judges["tiny-text"], home / "ranking", to="orbax")
    lines = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No!"} for n in range(3)]
    write_lines(home / "pairs.jsonl", lines)
    dialogs = [{"messages": [{"role": "user", "content": text}]} for text in ("Why?", "So?")]
    write_lines(home / "asked.jsonl", dialogs)
    return home


@pytest.fixture
def inside(run_folder, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    monkeypatch.chdir(run_folder)
    return run_folder


def test_the_command_judges(inside, capsys):
    assert main(["judge", "pairs.jsonl", "--model", "ranking"]) == 0
    told = capsys.readouterr().out
    assert "comparisons" in told and "calibration error" in told and "nats" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("judge", "pairs.jsonl", "--model", "tiny-text"), "no reward head"),
        (("judge", "asked.jsonl", "--model", "ranking"), "no answers to compare"),
        (("judge", "none.jsonl", "--model", "ranking"), "none.jsonl"),
        (("sample", "asked.jsonl", "out", "--model", "tiny-text", "--reward", "tiny-text"), "head"),
        (("sample", "asked.jsonl", "out", "--model", "tiny-text"), "nothing scores them"),
    ],
)
def test_what_cannot_be_judged_is_told(inside, capsys, arguments, said):
    assert main(list(arguments)) == 2
    complaint = capsys.readouterr().err.strip().splitlines()
    assert said in complaint[-1] and not (inside / "out/best.jsonl").exists()


def test_the_command_samples_and_ranks_by_a_reward_model(inside):
    how = ("--answers", "3", "--max-new-tokens", "100", "--temperature", "1.0", "--rows", "8")
    asking = ["sample", "asked.jsonl", "ranked", "--model", "tiny-text", "--reward", "ranking"]
    assert main([*asking, *how]) == 0
    answers = [json.loads(line) for line in (inside / "ranked/answers.jsonl").open()]
    finished = [a for a in answers if a["finished"]]
    assert finished and all(isinstance(a["reward"], float) for a in finished)
    assert all(a["verifier"] is None for a in answers)
    best = [json.loads(line) for line in (inside / "ranked/best.jsonl").open()]
    for each in best:
        own = [a["reward"] for a in finished if a["prompt"] == each["provenance"]["prompt"]]
        assert each["provenance"]["score"]["reward"] == max(own)
        assert len(each["provenance"]["reward_parameters"]) == 32
