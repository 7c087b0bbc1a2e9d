"""One of two processes is killed, frozen, or fails: the other ends soon, and says so."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from l32jax.train import journal

ROOT = Path(__file__).parents[2]
TIMEOUT = 240
PATIENCE = 60  # of which a loaded machine needs more than the 6 to 23 seconds that are meant


class Pair:
    """Two processes, of which `who` does `what` on the way."""

    def __init__(self, folder: Path, who: int, what: str, *saved: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._told = [folder / f"{number}.txt" for number in range(2)]
        child = [sys.executable, "-m", "tests.train_tests.peers_child", str(port)]
        self.processes = []
        for number, told in enumerate(self._told):
            place = [str(number), "2", str(folder), str(who), what, *saved]
            with told.open("w") as output:
                self.processes.append(
                    subprocess.Popen([*child, *place], cwd=ROOT, stdout=output, stderr=output)
                )

    def codes(self) -> list[int]:
        return [process.wait(TIMEOUT) for process in self.processes]

    def line(self, number: int) -> str:
        """The one that a process ended with; JAX's own and the resolver's do not count."""
        lines = self._told[number].read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("l32jax: "))
        assert line == lines[-1]
        return line

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def pair(tmp_path):
    pairs = []

    def start(*args: str | int) -> Pair:
        pairs.append(Pair(tmp_path, *args))
        return pairs[-1]

    yield start
    for each in pairs:
        each.close()


Start = Callable[..., Pair]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("who", [0, 1])
def test_when_a_process_is_killed_the_other_says_so_and_asks_to_be_started_again(
    who, pair: Start, tmp_path
):
    both = pair(who, "die", "saved")
    assert both.processes[who].wait(TIMEOUT) == -signal.SIGKILL
    killed = time.monotonic()
    assert both.processes[1 - who].wait(TIMEOUT) == 75
    assert time.monotonic() - killed < PATIENCE
    line = both.line(1 - who)
    assert f"process {who} on " in line and "has gone" in line
    assert line.endswith("; the same command goes on from what is saved")
    (told,) = journal.read(tmp_path / "hosts.jsonl").records
    assert (told["process"], told["what"]) == (who, "has gone")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_end_before_anything_was_saved_counts_as_a_failure(pair: Start):
    both = pair(1, "die")
    assert both.codes() == [1, -signal.SIGKILL]
    assert "nothing was saved since the start" in both.line(0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_frozen_process_counts_as_gone(pair: Start):
    both = pair(1, "freeze", "saved")
    assert both.processes[0].wait(TIMEOUT) == 75
    assert "process 1 on " in both.line(0) and "it was silent for" in both.line(0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("who", "what", "code"), [(0, "refuse", 2), (1, "fail", 1)])
def test_what_one_process_fails_of_ends_both_with_its_code(who, what, code, pair: Start):
    both = pair(who, what, "saved")
    assert both.codes() == [code, code]
    why = {"refuse": "record 7 of it: no text; mend it", "fail": "out of memory, say"}[what]
    assert both.line(who) == f"l32jax: error: {why}"
    assert both.line(1 - who).startswith(f"l32jax: process {who} on ")
    assert both.line(1 - who).endswith(f"has ended: {why}")
