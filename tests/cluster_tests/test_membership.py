"""Real processes join, compute together, or say in one line who is missing."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l32jax import cluster
from l32jax.__main__ import main
from l32jax.cluster import membership
from l32jax.errors import InputError
from tests.cluster_tests.test_roll_call import free_port

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
from l32jax import cluster
from l32jax.__main__ import main
import l32jax.cli.models
def models() -> int:
    "Joins."
    cluster.join()
    import jax
    from jax.experimental.multihost_utils import process_allgather
    ranks = process_allgather(jax.numpy.array([jax.process_index()])).ravel().tolist()
    sys.stdout.write(f"{list(cluster.hosts())};{ranks}\\n")  # at once: mpirun mixes writes
    return 0
l32jax.cli.models.models = models
sys.exit(main(["models"]))
"""


def start(process: int, number: int, port: int, **more: str) -> subprocess.Popen:
    told = {
        "L32JAX_NUM_PROCESSES": str(number),
        "L32JAX_PROCESS_ID": str(process),
        "L32JAX_COORDINATOR": f"127.0.0.1:{port}",
        "L32JAX_HOST": f"host{process}",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env=os.environ | told | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def test_processes_join_and_know_each_others_hosts_whatever_proxy_is_set():
    port = free_port()
    nowhere = {"http_proxy": "http://127.0.0.1:1", "HTTPS_PROXY": "http://127.0.0.1:1"}
    ended = ends([start(n, 2, port, **nowhere) for n in range(2)])
    assert [code for code, _, _ in ended] == [0, 0], ended
    # The last line: gloo, too, says something.
    assert {out.splitlines()[-1] for _, out, _ in ended} == {"['host0', 'host1'];[0, 1]"}
    line = "l32jax: 2 processes by L32JAX_*: 0=host0 1=host1\n"
    assert [err.count(line) for _, _, err in ended] == [1, 0]


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun here")
def test_processes_of_a_real_mpirun_join():
    """The one command on one host, as root may give it."""
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2"]
    ended = subprocess.run(
        [*command, sys.executable, "-c", CHILD],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "L32JAX_HOST": "host"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0
    assert ended.stdout.count("['host', 'host'];[0, 1]\n") == 2


def test_every_process_that_came_says_who_did_not():
    port, began = free_port(), time.monotonic()
    ended = ends([start(n, 3, port, L32JAX_START_SECONDS="15") for n in (0, 2)])
    assert time.monotonic() - began < 60
    for code, out, err in ended:
        assert (code, out) == (1, "")
        assert err.startswith("l32jax: error: start of 3 processes by L32JAX_*: process 1 did not")
        assert err.count("\n") == 1


def test_training_joins_first_of_all(tmp_path, monkeypatch, capsys):
    """Shown by an environment that tells half."""
    monkeypatch.setenv("L32JAX_PROCESS_ID", "0")
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(ROOT / "configs/easy_vqa_tiny.py")]) == 2
    assert "L32JAX_NUM_PROCESSES in the environment" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_process_alone_joins_nothing():
    cluster.join({})
    assert len(cluster.hosts()) == 1


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_told(text):
    with pytest.raises(InputError, match="L32JAX_START_SECONDS"):
        membership._start_seconds({"L32JAX_START_SECONDS": text})
