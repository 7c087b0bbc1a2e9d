"""Killed at random, again and again: the losses of a run that nothing stopped, to the last bit."""

import random

import pytest

from tests.train_tests.processes import NUM_STEPS, Run, config_in

KILLS = 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("processes", [1, 2])
def test_losses_of_a_run_killed_ten_times_are_those_of_one_never_stopped(
    processes, documents, beginning, tmp_path
):
    def run_in(name: str) -> Run:
        return Run(tmp_path / name, config_in(tmp_path / name / "run", documents, beginning))

    whole = run_in("whole")
    whole.finish(processes)
    assert len(whole.losses()) == sum(NUM_STEPS)
    assert len(set(whole.losses().values())) == sum(NUM_STEPS)

    killed, chance = run_in("killed"), random.Random(processes)
    kills = sum(
        killed.kill_after(chance.randrange(0, 9), chance.random() / 10, processes)
        for _ in range(KILLS)
    )
    assert kills == KILLS, "it ended too early to be killed as often"
    killed.finish(processes)
    assert killed.losses() == whole.losses()
