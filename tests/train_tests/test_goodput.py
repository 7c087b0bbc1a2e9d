"""Every second of a run is counted once, whatever was killed, undone and done again."""

import json
import time

import pytest

from l32jax.train import goodput, journal
from l32jax.train.goodput import IDLE, LOST, Clock, Goodput, read, total


def enter(when: float, step: int, stage: int = 0, *, starts: bool = False, **seconds: float):
    place = {"stage": stage, "step": step, "starts": starts}
    return {"event": "enter", "time": when, **place, "seconds": seconds}


def reached(when: float, done: int, stage: int = 0, **seconds: float):
    return {"event": "reached", "time": when, "stage": stage, "step": done, "seconds": seconds}


def test_what_a_kill_undoes_is_lost():
    """Steps 60 to 100 of the first process are done again, after three seconds of nobody."""
    events = [
        enter(100.0, 0, starts=True, training_prep=10.0),
        reached(150.0, 50, step=50.0),
        reached(200.0, 100, step=40.0, data_loading_sync=10.0),
        enter(210.0, 60, starts=True, training_prep=7.0),
        reached(250.0, 100, step=40.0),
    ]
    expected = {"training_prep": 17.0, "data_loading_sync": 10.0, IDLE: 3.0, LOST: 32.0}
    found = total(events)
    assert found.seconds == expected | {"step": 50.0 + 40.0 - 32.0 + 40.0}
    assert found.starts == 2


def test_a_second_kill_undoes_what_is_left_of_the_first():
    before = [enter(0.0, 0), reached(0.0, 100, step=100.0)]
    between = [enter(0.0, 80), reached(0.0, 90, step=10.0)]
    found = total([*before, *between, enter(0.0, 40), reached(0.0, 100, step=60.0)])
    assert found.seconds["step"] == pytest.approx(40.0 + 60.0)
    assert found.seconds[LOST] == pytest.approx(20.0 + 40.0 + 10.0)


def test_a_later_stage_undoes_nothing_of_an_earlier_one():
    first = [enter(0.0, 0), reached(0.0, 10, step=10.0)]
    second = [enter(0.0, 0, stage=1), reached(0.0, 5, stage=1, step=10.0)]
    assert total([*first, *second, enter(0.0, 0, stage=1)]).seconds == {"step": 10.0, LOST: 10.0}


def test_buckets_add_up_to_the_time_that_passed(tmp_path):
    began = time.monotonic()
    clock = Clock(tmp_path)
    time.sleep(0.02)
    clock.enter(0, 0)
    clock.switch("step")
    with clock.spending("unproductive_checkpoint_save_time"):
        time.sleep(0.05)
    time.sleep(0.1)
    clock.move(0.06, "data_loading_sync")
    clock.reached(0, 10, last=True)
    live = clock.so_far()
    clock.close()
    passed = time.monotonic() - began
    found = read(tmp_path)
    assert sum(found.seconds.values()) == pytest.approx(passed, abs=0.02)
    assert found.seconds["data_loading_sync"] == 0.06
    assert found.seconds["step"] == pytest.approx(0.04, abs=0.02)
    assert found.seconds["unproductive_checkpoint_save_time"] == pytest.approx(0.05, abs=0.02)
    assert live.share == pytest.approx(found.share, abs=0.02)
    assert str(found).startswith("goodput ") and "data_loading_sync" in str(found)


def test_a_run_that_has_nothing_left_to_do_does_not_go_on(tmp_path):
    clock = Clock(tmp_path)
    clock.close()
    assert list(tmp_path.iterdir()) == []
    assert read(tmp_path) == Goodput({}, 0)


def test_time_between_processes_is_idle(tmp_path):
    for _ in range(2):
        clock = Clock(tmp_path)
        clock.enter(0, 0)
        clock.close()
        time.sleep(0.1)
    found = read(tmp_path)
    assert found.starts == 2
    assert found.seconds[IDLE] == pytest.approx(0.1, abs=0.03)


def test_a_clock_without_a_folder_keeps_nothing():
    clock = Clock(None)
    clock.enter(0, 0)
    clock.reached(0, 1, last=True)
    clock.close()
    assert 0 <= clock.so_far().share <= 1


def test_lines_come_at_growing_intervals(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    clock = Clock(tmp_path)
    clock.enter(0, 0)
    for step in range(36_000):
        now[0] += 1.0
        clock.reached(0, step)
    lines = len(journal.read(tmp_path / goodput.FILE).records)
    assert 36_000 / 60 < lines < 36_000 / 60 + 100


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"event": "reached", "time": "now", "seconds": {}}',
        b'{"event": "reached", "time": 1, "seconds": {"step": "much"}}',
        b'{"event": "reached", "time": 1, "stage": [], "step": 3, "seconds": {}}',
        b'{"event": "enter", "time": 1, "seconds": {}}',
        b'{"event": {}, "time": 1, "seconds": {}}',
        b'{"event": "end", "time": 1e999, "seconds": {}}',
        b'{"event": "end", "time": NaN, "seconds": {}}',
        b"[" * 100_000,
        b"\xff\x00",
        b'{"time": 1' + b"0" * 5000 + b"}",
    ],
)
def test_damaged_lines_count_for_nothing(tmp_path, line):
    whole = json.dumps(enter(5.0, 0, starts=True, training_prep=2.0))
    (tmp_path / goodput.FILE).write_bytes(line + b"\n" + whole.encode() + b"\n")
    assert read(tmp_path) == Goodput({"training_prep": 2.0, IDLE: 0.0, "step": 0.0, LOST: 0.0}, 1)


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    with journal.open_to_append(path) as file:
        journal.append(file, {"a": 3})
    assert journal.read(path) == ([{"a": 1}, {"a": 3}], 1)


def test_of_a_long_file_the_end_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MAX_BYTES", 100)
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"a": number}) + "\n" for number in range(1000)))
    found = journal.read(path)
    assert found.damaged == 0
    assert found.records[-1] == {"a": 999} and len(found.records) == 9
