"""A process that opens odd checkpoints, and is started again when one has killed it."""

import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoint_tests.fuzzing.seeds import Seed

ROOT = Path(__file__).parents[3]
# Of one checkpoint. Seconds are the processor's: others may keep a machine busy for longer. The
# seeds are a few megabytes.
MAX_SECONDS, MAX_WALL, MAX_BYTES = 2.0, 60.0, 300 << 20
CHILD = "tests.checkpoint_tests.fuzzing.opening_child"


@dataclass(frozen=True)
class Outcome:
    """refusal: the error's text, None if the checkpoint was opened. where: its line of ours.

    complaint: what is wrong with how it went, None if nothing is.
    """

    refusal: str | None
    complaint: str | None
    where: str | None
    seconds: float
    wall: float
    grown: int


class Worker:
    """`open` from one thread only."""

    def __init__(self, log: Path, seeds: list[Seed]):
        self._log, self._seeds = log, seeds
        self._start()

    def _start(self) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TENSORSTORE_VERBOSE_LOGGING": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", CHILD],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("ab"),
            text=True,
        )
        for seed in self._seeds:  # imports, compilations, pools of threads; and that seeds are fine
            outcome = self._ask(seed.path, seed.kind, 8 << 30)
            assert outcome.refusal is None, (seed, outcome)

    def open(self, path: Path, kind: str) -> Outcome:
        outcome = self._ask(path, kind, MAX_BYTES)
        if self._process.poll() is not None:
            self._start()
        return outcome

    def _ask(self, path: Path, kind: str, limit: int) -> Outcome:
        process = self._process
        assert process.stdin and process.stdout
        request = {"path": str(path), "kind": kind, "limit": limit}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], MAX_WALL)
        answer = process.stdout.readline() if ready else ""
        if answer:
            return _judged(Outcome(**json.loads(answer)))
        process.kill()
        how = f"ended by signal {-process.wait()}" if ready else f"no end after {MAX_WALL:.0f} s"
        return Outcome(None, how, None, MAX_WALL, MAX_WALL, 0)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _judged(outcome: Outcome) -> Outcome:
    complaint = outcome.complaint
    if outcome.seconds > MAX_SECONDS:
        complaint = complaint or f"{outcome.seconds:.1f} s of processor time"
    if outcome.grown > MAX_BYTES:
        complaint = complaint or f"{outcome.grown >> 20} MiB more memory"
    return Outcome(**{**outcome.__dict__, "complaint": complaint})
