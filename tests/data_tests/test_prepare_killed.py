"""Whoever is killed while data is prepared, nothing is lost, and the bytes are the same."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from l32jax.data.prepare import run, runners
from l32jax.data.prepare.task import Task
from l32jax.errors import InputError
from tests.data_tests import prepare_child
from tests.data_tests.small_records import config_for, contents, prepare_here, write_records

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def whole(folder):
    prepare_here(config_for(folder, folder / "whole"))
    return contents(folder / "whole")


def test_killed_workers_lose_nothing(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "UNIT_RECORDS", prepare_child.UNIT_RECORDS)
    killed, finished = [], threading.Event()

    def kill_at_random():
        rng = random.Random(0)
        while len(killed) < 4 and not finished.is_set():
            time.sleep(rng.uniform(0.2, 1.2))
            if workers := multiprocessing.active_children():
                killed.append(rng.choice(workers).pid)
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_at_random)
    killer.start()
    try:
        run.prepare(config_for(folder, tmp_path / "out"), partial(prepare_child.slowly, workers=2))
    finally:
        finished.set()
        killer.join()
    assert killed
    assert contents(tmp_path / "out") == whole


class Deadly(Task):
    @property
    def result(self) -> Path:
        return Path("unit-of-death")

    def run(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_kills_every_worker_is_named():
    with pytest.raises(InputError, match="worker for unit-of-death: killed 5 times"):
        list(runners.on_processes([Deadly()], workers=1))


def start(config: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.data_tests.prepare_child", str(config)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for_units(output: Path, count: int) -> None:
    while len(list(output.glob("unfinished/unit-*.json"))) < count:
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stopped_or_killed_command_goes_on(folder, whole, tmp_path):
    config = tmp_path / "data.py"
    config.write_text(
        "from tests.data_tests.small_records import config_for\nfrom pathlib import Path\n"
        f"def config(): return config_for(Path({str(folder)!r}), Path({str(tmp_path / 'out')!r}))\n"
    )
    for count, number, code in ((1, signal.SIGTERM, 75), (3, signal.SIGKILL, -signal.SIGKILL)):
        process = start(config)
        wait_for_units(tmp_path / "out", count)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert code != 75 or "what is done is kept, and the same command goes on" in errors
        assert not (tmp_path / "out/index.json").exists()
        assert not psutil.wait_procs(workers, timeout=20)[1], "workers outlive their command"
    process = start(config)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert contents(tmp_path / "out") == whole
