"""A step that hangs ends the process; what merely takes long does not."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from pathlib import Path
from l32jax.train.ending import restart_from
from l32jax.train.goodput import Clock
from l32jax.train.watchdog import watchdog
from tests.train_tests.processes import text_in

folder, what = Path(sys.argv[1]), sys.argv[2]
saves = [0]
clock, config = Clock(None), text_in(folder, "none.jsonl", hung_after=0.5)
with watchdog(config, clock, restart_from(lambda: len(saves))):
    for step in range(4):
        clock.switch("program_startup" if step == 0 else "step")
        time.sleep(1.2 if step == 0 else 0.05)  # compiling takes long
        clock.switch("step")
        clock.reached(0, step)
    with clock.spending("unproductive_checkpoint_save_time"):
        time.sleep(1.2)
    saves.append(4)
    def hang_here():
        time.sleep(60 if what == "hang" else 0.1)
    hang_here()
print("done")
"""


def run(folder: Path, what: str) -> subprocess.CompletedProcess:
    child = [sys.executable, "-c", CHILD, str(folder), what]
    return subprocess.run(child, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_process_and_shows_its_stacks(tmp_path):
    began = time.monotonic()
    found = run(tmp_path, "hang")
    assert time.monotonic() - began < 60
    assert found.returncode == 75, found.stderr
    (line,) = found.stderr.splitlines()
    assert re.fullmatch(
        rf"l32jax: process 0 on .+ hangs: no step has ended for \d+ s; its stacks are in "
        rf"{tmp_path}/hung_0.txt; the same command goes on from what is saved",
        line,
    )
    assert "in hang_here" in (tmp_path / "hung_0.txt").read_text()


@pytest.mark.slow
def test_compiling_and_saving_may_take_longer_than_a_step(tmp_path):
    found = run(tmp_path, "go on")
    assert (found.returncode, found.stdout, found.stderr) == (0, "done\n", "")
