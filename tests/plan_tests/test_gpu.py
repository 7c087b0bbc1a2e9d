"""Plans for GPUs are arithmetic, and say so."""

import json
from pathlib import Path

import pytest

from l32jax.cli.plan import plan
from l32jax.errors import InputError
from l32jax.plan.gpu import plan_by_arithmetic
from l32jax.plan.report import print_candidates, print_plan
from l32jax.plan.topology import open_topology
from tests.plan_tests.test_analytic import text

CONFIG = Path(__file__).parents[2] / "configs/text_8b.py"


def test_machines_of_gpus_have_names():
    found = open_topology("h100:16x4")
    assert (str(found), len(found.devices), found.chip.per_host) == ("h100:16x4", 64, 4)


@pytest.mark.parametrize(
    ("name", "slices"), [("h100:16x9", 1), ("h100:8", 1), ("b200:2x2x2", 1), ("h200:4x8", 2)]
)
def test_machines_that_do_not_exist_are_refused(name, slices):
    with pytest.raises(InputError, match="machines by GPUs"):
        open_topology(name, slices)


def test_a_plan_says_that_it_is_arithmetic(capsys):
    found = plan_by_arithmetic(text(), 0, open_topology("h100:8x8"))
    assert 0.2 < (found.utilisation or 0) < 0.7
    print_plan(found, num_steps=10)
    print_candidates([found])
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("not from the compiled program") == 2
    assert "compiled in" not in told
    assert found.as_dict()["arithmetic"] == ("memory", "time")


def test_what_does_not_fit_has_no_time(capsys):
    found = plan_by_arithmetic(text(rows=8), 0, open_topology("h100:1x1"))
    assert found.time is None
    print_plan(found, num_steps=10)
    assert "does not fit" in " ".join(capsys.readouterr().out.split())


def test_rows_are_dealt_evenly():
    with pytest.raises(InputError, match="batch_size=100"):
        plan_by_arithmetic(text(rows=100), 0, open_topology("h100:8x8"))


def test_faster_cards_are_faster():
    steps = [
        plan_by_arithmetic(text(), 0, open_topology(f"{chip}:8x8")).seconds
        for chip in ("b200", "h200", "h100")
    ]
    assert steps == sorted(steps, key=lambda seconds: seconds or 0)


def test_a_search_lists_the_best_that_fit(tmp_path, capsys, monkeypatch):
    """As many as that where nothing can be compiled for GPUs."""
    monkeypatch.setattr("l32jax.plan.cuda.missing", lambda: "no plugin")
    written = tmp_path / "plans.json"
    small = ("stages.0.data.batch_size=64",)
    assert plan(CONFIG, small, topology="h100:4x8", search=True, json=written) == 0
    found = json.loads(written.read_text())
    assert [one["step_seconds"] for one in found] == sorted(one["step_seconds"] for one in found)
    assert len(found) == 8
    assert "fsdp=32" in capsys.readouterr().out


def test_a_search_tries_all_meshes():
    with pytest.raises(InputError, match="tries all of them"):
        plan(CONFIG, (), topology="h100:4x8", search=True, mesh="fsdp=32")
    with pytest.raises(InputError, match="no mesh, policy"):
        plan(CONFIG, (), topology="h100:1x1", search=True)
