"""A model is pruned by one command, or nothing is written."""

import json

import pytest

import l32jax
from l32jax.__main__ import main
from l32jax.conversion import convert

SMALLER = ("--layers", "3", "--mlp-dim", "96", "--heads", "2")
HOW = ("--calibration", "talk.jsonl", "--rows", "4", "--length", "64", "--mesh", "data=8")
PRUNE = ("prune", "tiny-text", "made/small")


@pytest.mark.slow
def test_a_pruned_model_is_one_that_answers_beside_its_report(run_folder, capsys):
    assert main(["prune", "tiny-text", "made/small/", "--to", "custom", *SMALLER, *HOW]) == 0
    told = capsys.readouterr().out
    assert "1 of 4 layers: " in told and "64 of 160 neurons" in told and "perplexity" in told
    model = l32jax.load("made/small")
    assert (model.config.decoder.num_groups, model.config.decoder.mlp_dim) == (3, 96)
    assert model.generate("3?", max_new_tokens=2)
    report = json.loads((run_folder / "made/small.pruning.json").read_text())
    assert [step["part"] for step in report["steps"]] == ["whole", "depth", "heads", "FFN"]
    assert len(report["steps"][1]["kept"]["groups"]) == 3
    assert len(report["steps"][3]["kept"]["neurons"]["0"][2]) == 96
    assert sorted(path.name for path in run_folder.glob("made/small*")) == [
        "small",
        "small.pruning.json",
    ]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("no room")])
def test_nothing_is_left_of_one_that_was_stopped(run_folder, monkeypatch, stop):
    def stopped(*_):
        raise stop

    monkeypatch.setattr(convert, "write", stopped)
    code = main([*PRUNE, "--to", "custom", "--layers", "3", *HOW])
    assert code == (130 if stop is KeyboardInterrupt else 1)
    assert not list(run_folder.glob("made/small*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "llama3.2-1b", "--layers", "3"), "--layers with --to llama3.2-1b"),
        (("--to", "custom"), "without a size"),
        (("--to", "llama3.2-1b"), "vocab_size=128256"),
        (("--to", "custom", "--layers", "5"), "num_groups=5"),
        (("--to", "custom", "--heads", "3"), "num_heads=3"),
        (("--to", "custom", "--mlp-dim", "0"), "mlp_dim=0"),
        (("--to", "custom", "--layers", "3", "--rows", "0"), "--rows 0"),
        (("--to", "custom", "--layers", "3", "--calibration", "none.jsonl"), "none.jsonl"),
        (("--to", "custom", "--layers", "3", "--mesh", "data=3"), "mesh"),
        (("--to", "custom", "--mlp-dim", "91", "--mesh", "tensor=2"), "axis tensor"),
    ],
)
def test_what_cannot_be_pruned_is_told(complaint, run_folder, options, said):
    assert said in complaint(*PRUNE, *HOW, *options)
    assert not list(run_folder.glob("made/small*"))


def test_a_vision_model_loses_whole_groups(complaint, run_folder):
    options = ("--to", "custom", "--layers", "4", *HOW)
    assert "groups of 5" in complaint("prune", "tiny-vision", "small", *options)


@pytest.mark.parametrize("name", ["made/small", "made/small.pruning.json"])
def test_nothing_is_overwritten(complaint, run_folder, name):
    (run_folder / "made").mkdir()
    (run_folder / name).write_text("mine")
    assert name in complaint(*PRUNE, "--to", "custom", "--layers", "3", *HOW)


def test_a_destination_that_cannot_be_is_told_at_once(complaint, run_folder):
    (run_folder / "file").write_text("mine")
    layers = ("--to", "custom", "--layers", "3", *HOW)
    told = complaint("prune", "tiny-text", "file/small", *layers)
    assert "'file/small': nothing can be written to" in told
    seeing = ("--to", "custom", "--mlp-dim", "96", *HOW)
    assert "GGUF holds text only" in complaint("prune", "tiny-vision", "small.gguf", *seeing)


def test_a_bucket_is_not_a_destination(complaint):
    options = ("--to", "custom", "--layers", "3", *HOW)
    assert "l32jax convert" in complaint("prune", "tiny-text", "gs://bucket/small", *options)


def test_a_calibration_too_small_to_hold_out_is_told(complaint, run_folder):
    (run_folder / "few.jsonl").write_text('{"text": "one"}\n')
    options = ("--to", "custom", "--layers", "3", *HOW, "--calibration", "few.jsonl")
    assert "--held-out" in complaint(*PRUNE, *options)
