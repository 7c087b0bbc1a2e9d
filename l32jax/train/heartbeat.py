"""Whether the process that trains a run is alive, said in a file beside it.

It names the process by what no other has: the machine since its last start, the namespace and
number of the process, and when it began. On that machine the system knows whether it still runs;
from elsewhere, a beat tells.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

FILE = "heartbeat.json"
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0  # after which a process elsewhere counts as dead
MAX_BYTES = 1 << 20

Ending = Literal["finished", "stopped", "crashed"]
Status = Literal["running", "finished", "stopped", "crashed", "unknown"]


class Heartbeat:
    """Beats in a thread of its own: compiling may take minutes in which no step ends."""

    def __init__(self, directory: Path):
        self._path = directory / FILE
        self._ended = threading.Event()
        self._beat("running")
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def end(self, ending: Ending) -> None:
        self._ended.set()
        self._thread.join()
        self._beat(ending)

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._beat("running")
            except OSError:
                continue  # a full disk ends no training; the next beat may get through

    def _beat(self, state: str) -> None:
        temporary = self._path.with_suffix(".json.new")
        temporary.write_text(json.dumps({"state": state, "time": time.time(), **_identity()}))
        os.replace(temporary, self._path)


class Beat(NamedTuple):
    """What became of a run's process, and when it was last heard of, in seconds since 1970."""

    status: Status
    time: float | None


def read(directory: Path) -> Beat:
    """Of a run in a folder that anybody may have written."""
    beat = read_object(directory / FILE)
    state, heard = beat.get("state"), beat.get("time")
    if not isinstance(heard, (int, float)):
        return Beat("unknown", None)
    if state == "running":
        state = "running" if _is_alive(beat, heard) else "crashed"
    known = state in ("running", "finished", "stopped", "crashed")
    return Beat(state if known else "unknown", heard)


def read_object(path: Path) -> dict[str, Any]:
    """A small JSON file's; empty if there is none, or it has something else."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(beat: dict[str, Any], heard: float) -> bool:
    if beat.get("machine") == _machine() and type(beat.get("pid")) is int:
        began = _began(beat["pid"])
        return began is not None and began == beat.get("began")
    return abs(time.time() - heard) < SILENCE_SECONDS


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {"machine": _machine(), "pid": pid, "began": _began(pid)}


def _machine() -> str | None:
    """Different after a restart, and in another container; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # its name may have spaces and parentheses
    return None if state in "ZX" else int(fields[18])
