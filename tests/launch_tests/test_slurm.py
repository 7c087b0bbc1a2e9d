"""launch/slurm on a real Slurm: two nodes of this machine, one process each."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch_tests.runs import CONFIG, NUM_STEPS, losses, write_run

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "tests/launch_tests/slurm.sh"
SBATCH = ROOT / "launch/slurm/train.sbatch"
TIMEOUT = 900


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[None]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started by root, on Linux")
    if not (shutil.which("slurmctld", path="/usr/sbin") or shutil.which("apt-get")):
        pytest.skip("there is neither Slurm nor apt-get to install it with")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SLURM, "start", folder], check=True, timeout=TIMEOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        # Where `l32jax` is; the rest as in a login shell.
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("JAX_PLATFORMS", "cpu")
        yield
    subprocess.run([SLURM, "stop", folder], check=True, timeout=TIMEOUT)


class Job:
    """A run in a folder of its own, given to Slurm."""

    def __init__(self, folder: Path, config: str = CONFIG):
        folder.mkdir()
        self.run, self._log = folder / "run", folder / "log.txt"
        write_run(folder, config)
        options = ["--parsable", "--time=60", f"--output={self._log}", f"--chdir={folder}"]
        self.number = out("sbatch", *options, SBATCH, "config.py").strip()

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not until():
            assert time.monotonic() < deadline, self.log()[-3000:]
            assert self.state() not in ("FAILED", "CANCELLED", "TIMEOUT"), self.log()[-3000:]
            time.sleep(0.1)

    def state(self) -> str:
        fields = out("scontrol", "--oneliner", "show", "job", self.number).split()
        return next(field for field in fields if field.startswith("JobState=")).partition("=")[2]

    def has_ended(self) -> bool:
        return self.state() == "COMPLETED"

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


def out(*command: str | Path) -> str:
    return subprocess.run(
        command, check=True, timeout=120, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT)
def test_a_preempted_job_is_queued_again_and_ends_as_one_never_stopped(slurm, tmp_path):
    whole = Job(tmp_path / "whole")
    whole.wait(whole.has_ended)
    assert "0: l32jax: 2 processes by Slurm: 0=127.0.0.1 1=127.0.0.2" in whole.log()
    assert sorted(losses(whole.run)) == list(range(1, NUM_STEPS + 1))

    preempted = Job(tmp_path / "preempted")
    preempted.wait(lambda: len(losses(preempted.run)) >= 5)
    out("scancel", "--signal=TERM", preempted.number)
    preempted.wait(preempted.has_ended)
    log = preempted.log()
    assert "train.sbatch: exit code 75 after 0 restarts" in log
    assert "train.sbatch: exit code 0 after 1 restarts" in log
    saved = [line.partition(" saved ")[2] for line in log.splitlines() if " saved " in line]
    assert len(saved) == 2 and len(set(saved)) == 1, "both tasks save the same step"
    assert losses(preempted.run) == losses(whole.run)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_a_job_with_bad_input_is_not_started_again(slurm, tmp_path):
    job = Job(tmp_path / "bad", config="def config():\n    return 1\n")
    deadline = time.monotonic() + TIMEOUT
    while job.state() != "FAILED":
        assert time.monotonic() < deadline, job.log()
        time.sleep(0.5)
    assert job.log().count("gives int, not a TrainConfig") == 2
    assert "train.sbatch: exit code 2 after 0 restarts" in job.log()
