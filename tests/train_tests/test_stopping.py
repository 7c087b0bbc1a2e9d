"""Asked to stop, in one process: all save the same step, and go on from it with the same bits."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.checkpoint.steps import Steps
from l32jax.cli import INTERRUPTED
from l32jax.train.board import Board
from l32jax.train.stopping import Stop
from tests.train_tests.processes import Run, text_in


class Notes(Board):
    """A board without a cluster."""

    def __init__(self):
        self._notes: dict[str, str] = {}

    def write_first(self, name: str, note: str) -> None:
        self._notes.setdefault(name, note)

    def read(self, name: str) -> str | None:
        return self._notes.get(name)


@given(st.data())
def test_all_processes_stop_after_the_same_step_however_far_apart_they_are(data):
    """One asks after step n when all others have dispatched step n - 1: they had a part in it."""
    count = data.draw(st.integers(2, 4), "processes")
    notes = Notes()
    processes = [Stop(notes) for _ in range(count)]
    asked, stopped = [0] * count, [0] * count
    caught = data.draw(st.sets(st.integers(0, count - 1), min_size=1), "which get a signal")
    moment = data.draw(st.integers(0, 12), "after how many turns")
    for turn in range(100):
        if turn == moment:
            for number in caught:
                processes[number]._received = True
        may = [n for n in range(count) if not stopped[n] and asked[n] <= min(asked) + 1]
        if not may:
            break
        number = data.draw(st.sampled_from(may))
        asked[number] += 1
        if processes[number].after_step():
            stopped[number] = asked[number]
    assert len(set(stopped)) == 1 and stopped[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signal_to_the_second_process_stops_both_after_the_same_step(sentences, tmp_path):
    def run_in(name: str) -> Run:
        return Run(tmp_path / name, text_in(tmp_path / name / "run", sentences))

    whole, asked = run_in("whole"), run_in("asked")
    whole.finish(2)
    processes = asked.start(2)
    assert asked.wait_for_lines(7, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert asked.codes(processes) == [INTERRUPTED] * 2, asked.told()
    step = Steps(asked.directory / "1_text").latest()
    lines = [line for line in asked.told().splitlines() if "saved stage" in line]
    line = f"l32jax: saved stage 'text' at step {step}; the same command goes on from there"
    assert lines == [line] * 2
    assert len(asked.losses()) == step
    asked.finish(2)
    assert asked.losses() == whole.losses()
