"""Programs that go wrong are over within seconds, pass nothing, and leave nothing behind."""

import os
import time
from pathlib import Path

import psutil
import pytest

from l32jax.align.programs import passes

TESTS = "assert double(4) == 8"
RIGHT = "def double(x):\n    return 2 * x\n"
SECONDS = 2.0

FAILING = {
    "wrong": "def double(x): return x",
    "no Python": "double(",
    "endless": "while True: pass",
    "asleep": "import time; time.sleep(100)",
    "deaf": "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "starts others": "import subprocess; subprocess.Popen(['sleep', '100'])",
    "leaves the group": "import os\nif os.fork() == 0: os.setsid()\nwhile True: pass",
    "eats memory": "x = []\nwhile True: x.append(bytearray(1 << 26))",
    "large number": "x = 10 ** 10 ** 10",
    "deep": "def f(): f()\nf()",
    "large file": "f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "many files": "for i in range(1000): globals()[f'f{i}'] = open(f'{i}', 'w')",
    "prints": "while True: print('x' * 10_000)",
    "leaves": "import os; os._exit(0)",
    "exits": "import sys; sys.exit(0)",
    "reads": "input()",
    "connects": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "native": "import ctypes",
    "half of a pair": "x = '\ud800'",
    "long": "x = 1\n" * 1_000_000,
}


def processes() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("name", FAILING)
def test_what_goes_wrong_passes_nothing_and_is_gone_within_seconds(name):
    before, begun = processes(), time.monotonic()
    assert not passes(FAILING[name], TESTS, seconds=SECONDS)
    assert time.monotonic() - begun < SECONDS + 3
    assert processes() <= before


def test_a_right_program_passes():
    assert passes(RIGHT, TESTS)
    library = "import collections, dataclasses, heapq, itertools, json, math, re, typing\n"
    assert passes(library + "import threading, tempfile, random\n" + RIGHT, TESTS)


def test_files_can_be_written_where_it_runs_and_nowhere_else(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("a")
    own = "open('b', 'w').write('c'); assert open('b').read() == 'c'\nimport os; os.remove('b')\n"
    assert passes(own + RIGHT, TESTS)
    for harm in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.symlink({str(tmp_path)!r}, 'd'); open('d/kept', 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import pathlib; pathlib.Path({str(kept)!r}).rename('e')",
    ):
        assert not passes(f"{harm}\n{RIGHT}", TESTS)
    assert kept.read_text() == "a"


def test_it_sees_no_environment_and_no_packages(monkeypatch):
    monkeypatch.setenv("SECRET", "a")
    assert passes("import os; assert 'SECRET' not in os.environ\n" + RIGHT, TESTS)
    assert not passes("import numpy\n" + RIGHT, TESTS)


def test_folders_and_descriptors_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc").exists() else 0
    for program in (RIGHT, FAILING["large file"], FAILING["long"], FAILING["half of a pair"]):
        passes(program, TESTS, seconds=SECONDS)
    assert not list(tmp_path.iterdir())
    assert not before or len(os.listdir("/proc/self/fd")) == before
