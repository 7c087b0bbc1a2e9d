"""`l32jax runs` tells the truth about folders, whatever was killed, and whoever wrote them."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l32jax.__main__ import main
from l32jax.errors import InputError
from l32jax.presets import TINY_TEXT
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.train import heartbeat, run_folder
from l32jax.train.run_folder import METRICS, at_work, find, see
from l32jax.train.sparkline import sparkline

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys, time
from l32jax.run_config import TrainConfig
from l32jax.config_text import from_json
from l32jax.train.run_folder import at_work

with at_work(from_json(TrainConfig, sys.argv[1]), writing=True, stopped_by=KeyError) as clock:
    clock.enter(0, 0)
    print("working", flush=True)
    time.sleep(60)
"""


class Stopped(Exception):
    pass


def config_in(directory: Path) -> TrainConfig:
    data = DataConfig(mixture=(("none.jsonl", 1.0),), batch_size=4, length=16)
    stages = tuple(
        StageConfig(
            name=name,
            num_steps=steps,
            trains=("language_model",),
            data=data,
            optimizer=OptimizerConfig(peak_lr=1e-3),
        )
        for name, steps in (("trunk", 100), ("anneal", 50))
    )
    return TrainConfig(model=TINY_TEXT, stages=stages, directory=str(directory))


def work(directory: Path, error: BaseException | None = None) -> None:
    expected = contextlib.suppress(type(error)) if error else contextlib.nullcontext()
    with expected, at_work(config_in(directory), writing=True, stopped_by=Stopped) as clock:
        clock.enter(0, 0)
        if error:
            raise error


def write_metrics(directory: Path, *records: tuple[str, int, float]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / METRICS).open("a") as file:
        for stage, step, loss in records:
            file.write(json.dumps({"stage": stage, "step": step, "loss": loss}) + "\n")


@pytest.fixture
def worker(tmp_path):
    """A process that is at work on the run `tmp_path / "run"`."""
    text = json.dumps(dataclasses.asdict(config_in(tmp_path / "run")))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER, text]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"working\n"
        yield process
        process.kill()


# How a run is


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"),
        (Stopped(), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (ValueError(), "crashed"),
        (SystemExit(), "crashed"),
    ],
)
def test_how_a_run_ended_is_known(tmp_path, error, status):
    work(tmp_path, error)
    assert see(tmp_path).status == status


def test_a_killed_run_has_crashed(tmp_path, worker):
    run = tmp_path / "run"
    assert see(run).status == "running"
    refused = at_work(config_in(run), writing=True, stopped_by=Stopped)
    with pytest.raises(InputError, match="another process"), refused:
        pass
    assert see(run).status == "running", "who was turned away has changed nothing"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert see(run).status == "crashed"
    work(run)
    assert see(run).status == "finished"


def test_another_process_with_the_same_number_is_another(tmp_path, worker):
    path = tmp_path / "run" / heartbeat.FILE
    beat = json.loads(path.read_text())
    assert beat["pid"] == worker.pid
    path.write_text(json.dumps(beat | {"began": beat["began"] - 1}))
    assert see(tmp_path / "run").status == "crashed"


@pytest.mark.parametrize(("ago", "status"), [(5.0, "running"), (3600.0, "crashed")])
def test_from_elsewhere_the_last_beat_tells(tmp_path, ago, status):
    beat = {"state": "running", "time": time.time() - ago, "machine": "other", "pid": 1}
    (tmp_path / heartbeat.FILE).write_text(json.dumps(beat))
    assert see(tmp_path).status == status


def test_hearts_beat_while_steps_take_long(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    with at_work(config_in(tmp_path), writing=True, stopped_by=Stopped):
        first = heartbeat.read(tmp_path).time
        deadline = time.monotonic() + 5
        while heartbeat.read(tmp_path).time == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heartbeat.read(tmp_path).time > first


def test_processes_that_do_not_write_leave_nothing(tmp_path):
    with at_work(config_in(tmp_path / "run"), writing=False, stopped_by=Stopped) as clock:
        clock.enter(0, 0)
    assert list(tmp_path.iterdir()) == []


# How far a run is


def test_what_was_told_before_a_kill_counts_once(tmp_path):
    work(tmp_path)
    write_metrics(tmp_path, *((("trunk", step, 5.0 - step / 100)) for step in (20, 40, 60, 80)))
    write_metrics(tmp_path, ("trunk", 60, 1.0))
    seen = see(tmp_path)
    assert (seen.stage, seen.stage_name, seen.step) == ((1, 2), "trunk", (60, 100))
    assert seen.losses == [4.8, 4.6, 1.0]
    write_metrics(tmp_path, ("trunk", 100, 0.9), ("anneal", 10, 0.8), ("anneal", 10, 0.7))
    seen = see(tmp_path)
    assert (seen.stage, seen.step) == ((2, 2), (10, 50))
    assert seen.losses == [4.8, 4.6, 1.0, 0.9, 0.7]


def test_damaged_lines_are_left_out_and_told(tmp_path, capsys):
    write_metrics(tmp_path / "run", ("trunk", 10, 2.0))
    with (tmp_path / "run" / METRICS).open("ab") as file:
        file.write(b'\xff\n{"stage": 3}\n{"stage": "trunk", "step": "many"}\n{"stage": "tru\n')
    write_metrics(tmp_path / "run", ("trunk", 20, float("nan")))
    assert main(["runs", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.err == f"l32jax: {tmp_path}/run/{METRICS}: 2 lines are damaged and left out\n"
    assert see(tmp_path / "run").losses == [2.0]
    assert "20" in told.out


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"time": [], "stages": 3}', '{"stages": [1, {"name": []}]}', "\x00"]
)
def test_folders_that_anybody_wrote_are_survived(tmp_path, content):
    for name in (run_folder.RUN, heartbeat.FILE, "goodput.jsonl", METRICS):
        (tmp_path / name).write_text(content)
    seen = see(tmp_path)
    assert (seen.status, seen.model, seen.losses) == ("unknown", None, [])
    assert main(["runs", str(tmp_path)]) == 0


# The verb


def test_runs_are_found_below_a_folder(tmp_path, capsys):
    work(tmp_path / "deep" / "er" / "one")
    write_metrics(tmp_path / "two", ("talk", 3, 2.5))
    (tmp_path / "two" / "1_talk").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(find(tmp_path)) == [tmp_path / "deep" / "er" / "one", tmp_path / "two"]
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (one,) = (line for line in lines if "deep/er/one" in line)
    (two,) = (line for line in lines if "two" in line)
    assert "tiny-text" in one and "finished" in one and "0 s ago" in one
    assert "talk" in two and "2.5" in two and "unknown" in two


def test_runs_as_json(tmp_path, capsys):
    work(tmp_path / "run", Stopped())
    write_metrics(tmp_path / "run", ("trunk", 100, 2.0), ("anneal", 5, 1.5))
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["path"] == str(tmp_path / "run")
    assert (record["model"], record["status"], record["loss"]) == ("tiny-text", "stopped", 1.5)
    assert (record["stage"], record["stage_name"], record["step"]) == ([2, 2], "anneal", [5, 50])
    assert 0 <= record["goodput"] <= 1 and record["damaged"] == 0


def test_a_folder_without_runs_says_so(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs below {tmp_path}\n"


def test_a_missing_folder_is_named(complaint, tmp_path):
    assert "nowhere" in complaint("runs", tmp_path / "nowhere")


def test_listing_imports_no_jax(tmp_path):
    work(tmp_path / "run")
    code = "import sys; from l32jax.__main__ import main; main(['runs', sys.argv[1]])"
    code += "; print({'jax', 'numpy'} & set(sys.modules))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 1.0, 2.0], "▁▅█"),
        ([float(n) for n in range(100)], "▁▂▄▅▇█"),
    ],
)
def test_sparklines(values, line):
    assert sparkline(values, 6) == line
