"""Real processes: any number trains the same, goes on from another, and outlives a kill."""

import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from l32jax.checkpoint.steps import Steps, verify
from tests.train_tests.processes import Run, text_in

NUM_STEPS, SAVED = 30, 10
FSDP = ("mesh.data=2", "mesh.fsdp=2")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run_in(folder: Path, source: str) -> Run:
    config = text_in(folder / "run", source, save_every=SAVED, keep=9)
    stage = replace(config.stages[0], num_steps=NUM_STEPS)
    return Run(folder, replace(config, stages=(stage,)))


def assert_same(ours: Run, whole: Run) -> None:
    assert ours.losses().keys() == whole.losses().keys()
    losses = [[run.losses()[key] for key in whole.losses()] for run in (ours, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.fixture(scope="module")
def whole(sentences, tmp_path_factory) -> Run:
    """Of one process, which nothing stopped."""
    run = run_in(tmp_path_factory.mktemp("runs") / "whole", sentences)
    run.finish(1)
    assert len(set(run.losses().values())) == NUM_STEPS
    return run


@pytest.fixture(scope="module")
def begun(sentences, tmp_path_factory) -> dict[int, Run]:
    """By the number of processes that saved a step of them, and nothing after it."""

    def begin(count: int) -> Run:
        run = run_in(tmp_path_factory.mktemp("runs") / f"begun_{count}", sentences)
        run.finish(count)
        for step in Steps(run.directory / "1_text").all():
            if step > SAVED:
                shutil.rmtree(run.directory / "1_text" / str(step))
        return run

    return {count: begin(count) for count in (1, 2)}


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (2, ()),
        (4, ()),
        (2, ("mesh.fsdp=1", "mesh.context=2")),
        (4, ("mesh.fsdp=2", "mesh.tensor=2")),
    ],
    ids=["2", "4", "2 that share rows", "2 and 2 that share rows"],
)
def test_any_number_of_processes_trains_the_same(count, changes, whole, sentences, tmp_path):
    run = run_in(tmp_path / "run", sentences)
    run.finish(count, *changes)
    assert_same(run, whole)


@pytest.mark.parametrize(
    ("before", "count", "changes"),
    [(2, 1, ()), (1, 2, ("mesh.data=1", "mesh.fsdp=-1")), (2, 4, FSDP)],
)
def test_another_number_of_processes_and_another_mesh_go_on_with_the_same_losses(
    before, count, changes, begun, whole, sentences, tmp_path
):
    run = run_in(tmp_path / "run", sentences)
    shutil.copytree(begun[before].directory / "1_text", run.directory / "1_text")
    run.finish(count, *changes)
    assert f"goes on from step {SAVED} with another config" in run.told()
    assert len(run.losses()) == NUM_STEPS - SAVED
    for key, loss in run.losses().items():
        assert loss == pytest.approx(whole.losses()[key], rel=1e-5)


@pytest.mark.parametrize("who", [0, 1])
def test_when_one_of_two_is_killed_the_other_stops_and_a_relaunch_goes_on_bit_for_bit(
    who, begun, sentences, tmp_path
):
    run, chance = run_in(tmp_path / "run", sentences), random.Random(who)
    processes = run.start(2)
    assert run.wait_for_lines(chance.randrange(2, NUM_STEPS - 5), processes)
    processes[who].send_signal(signal.SIGKILL)
    codes = run.codes(processes)
    assert codes[who] == -signal.SIGKILL
    saved = bool(Steps(run.directory / "1_text").all())  # its last save may not have come so far
    assert codes[1 - who] == (75 if saved else 1), run.told()[-3000:]
    (line,) = (line for line in run.told().splitlines() if "has gone" in line)
    assert line.startswith(f"l32jax: process {who} on ")
    assert not saved or verify(run.directory / "1_text") == []
    run.finish(2)
    assert run.losses() == begun[2].losses()
