"""Shell scripts: clean, ending in `l32jax train`, and saying to gcloud what it understands."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(
    path
    for folder in (LAUNCH, ROOT / "tests", ROOT / "l32jax")
    for path in folder.rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
LAUNCHERS = sorted(path for path in LAUNCH.rglob("*.*") if path.name != "create.sh")
CONFIG = ("my run.py", "seed=1")
# Says what it is told, and what a slice is like: not there, then on its way, then there.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$LOG"; printf '\\n' >>"$LOG"
case "$*" in
  *describe*) read -r state <"$STATES"; sed -i 1d "$STATES"; echo "$state" ;;
  *"l32jax train"*) read -r code <"$CODES"; sed -i 1d "$CODES"; exit "$code" ;;
esac
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_shellcheck_has_nothing_to_say(path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, path], stdout=subprocess.PIPE, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_every_launcher_ends_in_the_one_command(path):
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    commands = [line for line in lines if re.search(r"\bl32jax(,)? train\b", line)]
    assert len(commands) == 1
    assert re.search(r'"\$@"|\$\{?CONFIG|\$command|printf', commands[0])


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_flags_are_not_set_beside_their_table(path):
    assert not re.search(r"XLA_FLAGS|LIBTPU_INIT_ARGS|NCCL_|XLA_PYTHON", path.read_text())


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A stand-in on PATH, and what it was told."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "gcloud"
    stub.write_text(GCLOUD)
    stub.chmod(0o755)
    for name in ("LOG", "STATES", "CODES"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    given = {"NAME": "twin", "ZONE": "z", "TYPE": "v5p-16", "RUNTIME": "v2", "POLL_SECONDS": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def told(folder: Path) -> list[list[str]]:
    lines = (folder / "LOG").read_text().split("\0\n")
    return [line.split("\0") for line in lines if line]


def verbs(folder: Path) -> list[str]:
    return [command[3] for command in told(folder)]


def run(script: str, *arguments: str) -> int:
    return subprocess.run([LAUNCH / "tpu_vm" / script, *arguments], timeout=120).returncode


def test_a_slice_is_asked_for_once_and_waited_for(gcloud):
    (gcloud / "STATES").write_text("\n\nPROVISIONING\nPROVISIONING\nACTIVE\n")
    assert run("create.sh", "--spot") == 0
    assert verbs(gcloud).count("create") == 1 and "delete" not in verbs(gcloud)
    assert verbs(gcloud)[-2:] == ["scp", "ssh"]
    (create,) = [command for command in told(gcloud) if command[3] == "create"]
    assert {"--node-id=twin", "--accelerator-type=v5p-16", "--spot", "--zone=z"} <= set(create)


def test_what_preemption_leaves_is_removed_first(gcloud):
    (gcloud / "STATES").write_text("SUSPENDED\n\nACTIVE\n")
    assert run("create.sh") == 0
    assert verbs(gcloud)[1:4] == ["delete", "describe", "create"]


def test_a_slice_that_cannot_be_had_is_told(gcloud):
    (gcloud / "STATES").write_text("\nPROVISIONING\nFAILED\nFAILED\n")
    assert run("create.sh") == 1
    assert "scp" not in verbs(gcloud)


@pytest.mark.parametrize(
    ("codes", "starts", "code"), [("0", 1, 0), ("2", 1, 2), ("75 1 75 0", 4, 0), ("1 1 1 1", 3, 1)]
)
def test_training_starts_again_but_after_bad_input(codes, starts, code, gcloud, monkeypatch):
    monkeypatch.setenv("MAX_RESTARTS", "2" if codes.startswith("1") else "9")
    (gcloud / "CODES").write_text(codes.replace(" ", "\n") + "\n")
    assert run("run.sh", *CONFIG) == code
    assert len(told(gcloud)) == starts
    assert "l32jax train my\\ run.py seed=1" in told(gcloud)[0][-1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="there is no gcloud here")
def test_gcloud_knows_what_it_is_told(gcloud, monkeypatch):
    """The real one, without an account: it reads its arguments first."""
    (gcloud / "STATES").write_text("SUSPENDED\n\nACTIVE\n")
    (gcloud / "CODES").write_text("0\n")
    assert (run("create.sh", "--spot"), run("run.sh", *CONFIG)) == (0, 0)
    commands = {json.dumps(command) for command in told(gcloud)}
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(gcloud / "account"))
    monkeypatch.setenv("CLOUDSDK_CORE_PROJECT", "project")
    wrong = ["compute", "tpus", "tpu-vm", "ssh", "twin", "--zone=z", "--comand=ls"]
    assert "unrecognized arguments" in said(wrong)
    for command in commands:
        assert "active account" in said(json.loads(command)), command


def said(command: list[str]) -> str:
    return subprocess.run(
        ["gcloud", *command], stderr=subprocess.PIPE, text=True, timeout=120
    ).stderr
