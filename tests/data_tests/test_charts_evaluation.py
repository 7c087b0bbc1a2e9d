"""Evaluation on charts, and that of asking many questions that it shares."""

import itertools

import pytest
from rich.console import Console

import l32jax
from l32jax.data.charts import baselines
from l32jax.data.charts.questions import questions, reply
from l32jax.data.charts.scenes import Charts, description
from l32jax.evaluate import asking, charts

PICTURES = 8


@pytest.fixture(scope="module")
def model():
    return l32jax.load("tiny-vision")


@pytest.fixture(autouse=True)
def quick_baselines(monkeypatch):
    monkeypatch.setattr(baselines, "COUNTED", 500)


@pytest.mark.parametrize("split", ["test", "test-unseen"])
def test_who_reads_everything_is_always_right(monkeypatch, model, split):
    scenes = itertools.islice(Charts(split), PICTURES)
    truths = [reply(description(scene), q) for scene in scenes for q in questions(scene)]
    monkeypatch.setattr(charts, "replies", lambda model, asked, *, max_new_tokens: truths)
    score = charts.accuracy(model, split, pictures=PICTURES)
    assert set(score.model.values()) == {1.0}
    assert score.model.keys() == score.blind.keys() == score.majority.keys()
    assert score.majority[charts.ALL] <= score.blind[charts.ALL] < 0.6


def test_who_says_the_commonest_answer_is_as_good_as_blind(monkeypatch, model):
    guesses = baselines.majority_answers(charts.TINY)
    monkeypatch.setattr(
        charts,
        "replies",
        lambda model, asked, *, max_new_tokens: [guesses.get(q, "") for q, _ in asked],
    )
    score = charts.accuracy(model, "test", pictures=PICTURES)
    assert score.model == score.blind


def test_an_untrained_model_is_asked_about_every_picture(monkeypatch, model):
    monkeypatch.setattr(asking, "ROWS", 4)
    score = charts.accuracy(model, "test", pictures=1, max_new_tokens=2)
    assert score.model[charts.ALL] < 0.5


def test_the_table_has_a_row_for_each_kind_and_a_column_for_each_split():
    shares = {"bars value": 0.5, charts.ALL: 0.25}
    scores = [
        charts.Score("test", shares, shares, shares),
        charts.Score("test-unseen", {charts.ALL: 0.125}, {charts.ALL: 0.0}, {}),
    ]
    console = Console(width=80, record=True, quiet=True)
    made = charts.table(scores)
    assert [column.header for column in made.columns] == [
        "kind", "test", "blind", "test-unseen", "blind",
    ]  # fmt: skip
    console.print(made)
    assert made.row_count == 2
