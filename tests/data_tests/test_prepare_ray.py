"""Ray writes the same bytes as local processes, also when its workers are killed.

tests/environments/run.sh has Ray.
"""

import threading
import time

import psutil
import pytest

from l32jax.data.prepare import run
from l32jax.data.prepare.runners import on_ray
from tests.data_tests import prepare_child
from tests.data_tests.small_records import config_for, contents, prepare_here, write_records

ray = pytest.importorskip("ray", reason="tests/environments/run.sh ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


def at_work() -> list[psutil.Process]:
    """The workers of our own cluster that run a task."""
    ours = psutil.Process().children(recursive=True)
    return [process for process in ours if _title(process).startswith("ray::Map")]


def _title(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""


def test_the_same_bytes_though_workers_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "UNIT_RECORDS", 16)
    folder = write_records(tmp_path)
    index = prepare_here(config_for(folder, tmp_path / "here"))
    killed, finished = [], threading.Event()

    def kill_some():
        while len(killed) < 3 and not finished.is_set():
            time.sleep(0.1)
            if workers := at_work():
                workers[0].kill()
                killed.append(workers[0].pid)
                time.sleep(2)

    def runner(tasks):
        slow = [prepare_child.Unsaved(task) for task in tasks]
        return on_ray(slow, address="local")

    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        assert run.prepare(config_for(folder, tmp_path / "ray"), runner) == index
    finally:
        finished.set()
        killer.join()
    assert killed
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
