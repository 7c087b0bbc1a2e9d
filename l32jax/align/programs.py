"""Runs a program that nobody vouches for against tests, in a process with limits.

This stops mistakes: endless loops, too much memory, files or output, further processes, changes to
other folders. It is no sandbox: who means harm finds a way round it, to this user's files and the
network. Where answers may be hostile, run the whole command in a container that has neither.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 5.0  # of the clock, and of processors
LIMITS = {"AS": 1 << 30, "FSIZE": 1 << 20, "NPROC": 1, "CORE": 0, "NOFILE": 64}
MAX_CHARS = 1 << 20  # of a program and its tests

# What the other process runs. That tests have ended is told by a word that the program does not
# know: an answer that leaves by sys.exit() or os._exit(0) has passed nothing. The limit on
# processes does not bind root, so Python itself is to refuse them, and files elsewhere.
HARNESS = """
import json, os, resource, sys

PROCESSES = ("os.fork", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "os.kill", "pty.",
             "subprocess.", "ctypes.", "socket.")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.ch",
           "os.truncate", "os.utime", "shutil.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def guard(folder, realpath):
    def is_elsewhere(path):
        return isinstance(path, (str, bytes)) and not (
            realpath(os.fsdecode(path)) + "/").startswith(folder + "/")

    def refuse(event, arguments):
        changes = event.startswith(CHANGES) or event == "open" and arguments[2] & WRITING
        if event.startswith(PROCESSES) or changes and any(map(is_elsewhere, arguments)):
            raise PermissionError(event)

    return refuse

def main():
    with open("given.json", encoding="utf-8") as file:
        given = json.load(file)
    os.unlink("given.json")
    for name, value in given["limits"].items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    for module in ("_posixsubprocess", "_ctypes"):
        sys.modules[module] = None
    sys.addaudithook(guard(os.path.realpath("."), os.path.realpath))
    names = {"__name__": "__main__"}
    for text in (given["program"], given["tests"]):
        exec(compile(text, "answer", "exec"), names)
    os.write(given["told"], given["word"].encode())

main()
"""


def passes(program: str, tests: str, *, seconds: float = SECONDS) -> bool:
    """Whether the tests run to their end after the program, with its names, in time.

    The process has no environment, a folder of its own that is removed, and no packages but
    Python's own; it is gone, with all of its group, when this returns.
    """
    if len(program) + len(tests) > MAX_CHARS:
        return False
    with tempfile.TemporaryDirectory(prefix="l32jax-", ignore_cleanup_errors=True) as folder:
        told, tell = os.pipe()
        try:
            return _ends(program, tests, Path(folder), told, tell, seconds)
        finally:
            os.close(told)


def _ends(program: str, tests: str, folder: Path, told: int, tell: int, seconds: float) -> bool:
    word = secrets.token_hex()
    given = {
        "program": program, "tests": tests, "word": word, "told": tell,
        "limits": LIMITS | {"CPU": int(seconds) + 1},
    }  # fmt: skip
    try:
        (folder / "given.json").write_text(json.dumps(given), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", HARNESS],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=folder, env={}, pass_fds=(tell,), start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(tell)
    try:
        return _read(told, len(word), seconds) == word.encode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(told: int, size: int, seconds: float) -> bytes:
    """What comes before the other end is closed, or the time is over."""
    read, end = b"", time.monotonic() + seconds
    while len(read) < size:
        ready, _, _ = select.select([told], [], [], max(end - time.monotonic(), 0))
        piece = os.read(told, size - len(read)) if ready else b""
        if not piece:
            break
        read += piece
    return read
