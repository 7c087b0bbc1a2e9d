"""What becomes of a process when another process of its run has gone, or has failed.

Steps need all processes. If one is missing, the others wait in a step, or their step fails; what
they know of it is a line about a socket, or nothing. So each process beats: it counts up a note on
the board, the first process looks who has stopped counting, and writes down who. A process that
fails by itself writes down why. All who read that end: with its code if it has failed, otherwise so
that launchers start the run again.
"""

import json
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from l32jax.errors import InputError, one_line
from l32jax.train import aborting
from l32jax.train.board import Board
from l32jax.train.ending import FAILED, REFUSED, Restart, leave, own_host
from l32jax.train.hosts import record
from l32jax.train.stopping import Agreed

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 16.0  # without a beat, after which a process counts as gone; JAX waits for 30
SUSPECT_SECONDS = 6.0  # the same, when a step has failed here
TRIAL_SECONDS = 12.0  # in which a process whose step has failed looks for another to blame
GRACE_SECONDS = 2 * BEAT_SECONDS + 1  # for all to read what process 0 takes with it
LOCKED_SECONDS = 0.5  # without an answer of the board, in an abort that takes six
FAILURES = 3  # of looks at the board in a row, after which the first process counts as gone

logger = logging.getLogger(__name__)


class Peers:
    """Watches the other processes of a run, from threads of its own, until it is closed.

    Args:
      restart: how a process ends whose peers have gone.
      directory: of the run, where it is written down who has gone.
    """

    def __init__(self, board: Board, restart: Restart, directory: Path):
        self._board, self._restart, self._directory = board, restart, directory
        self._number = jax.process_index()
        self._hosts: dict[int, str] = {}
        self._counts: dict[str, tuple[str, float]] = {}  # of each process, and since when
        self._asked: float | None = None  # since when an answer of the board is waited for
        self._ending = False
        self._failed = threading.Event()
        self._acquitted = threading.Event()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=run, daemon=True, name=name)
            for name, run in (("peers", self._watch), ("aborts", self._watch_for_abort))
        ]
        aborting.delay()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Around work with others: if it fails, the process ends, whoever is to blame.

        An exception would go by way of those who wait for the others, and not come far.
        """
        try:
            yield
        except Agreed:
            raise
        except InputError as error:
            self.end(one_line(error), REFUSED)
            leave(f"error: {error}", REFUSED)
        except Exception as error:
            self._failed.set()
            self._acquitted.wait()
            self.end(one_line(error), FAILED)
            traceback.print_exc()
            leave(f"error: {one_line(error)}", FAILED)

    def end(self, why: str, code: int) -> None:
        """Tells the others why this process is about to end, and gives them time to read it."""
        self._ending = True
        note = {"process": self._number, "host": own_host(), "why": why, "code": code}
        try:
            self._board.write_first("ended", json.dumps(note))
        except jax.errors.JaxRuntimeError:
            return  # then the first process has gone, as they will see
        if self._number == 0:
            time.sleep(GRACE_SECONDS)

    def _watch(self) -> None:
        failures, beats, began = 0, 0, None
        while not self._closed.wait(0.5 if self._failed.is_set() else BEAT_SECONDS):
            began = began or (time.monotonic() if self._failed.is_set() else None)
            beats += 1
            try:
                self._asked = time.monotonic()
                self._look(str(beats))
                self._asked, failures = None, 0
            except jax.errors.JaxRuntimeError as error:
                failures += 1
                logger.debug("the board does not answer", exc_info=error)
                if failures == FAILURES:
                    self._leave_lost()
            if began and time.monotonic() - began > TRIAL_SECONDS:
                self._acquitted.set()

    def _look(self, beat: str) -> None:
        self._board.write(f"beats/{self._number}", f"{beat} {own_host()}")
        suspicious = self._failed.is_set()
        if self._number == 0 or suspicious or 0 not in self._hosts:
            self._count(time.monotonic(), SUSPECT_SECONDS if suspicious else SILENCE_SECONDS)
        if ended := self._board.read("ended"):
            self._follow(json.loads(ended))

    def _count(self, now: float, limit: float) -> None:
        """Accuses who has not counted on for so many seconds."""
        for name, note in self._board.read_all("beats").items():
            self._hosts[int(name)] = note.partition(" ")[2]
            if self._counts.get(name, ("", 0.0))[0] != note:
                self._counts[name] = note, now
            silence = now - self._counts[name][1]
            if silence > limit and int(name) != self._number:
                self._accuse(int(name), silence)

    def _accuse(self, number: int, silence: float) -> None:
        why = f"it was silent for {silence:.0f} s"
        note = {"process": number, "host": self._hosts[number], "why": why, "code": None}
        self._board.write_first("ended", json.dumps(note))

    def _follow(self, ended: dict[str, Any]) -> None:
        """Another's end is this one's, once all have read of it: the board goes with process 0."""
        if self._ending:
            return
        time.sleep(GRACE_SECONDS if self._number == 0 else BEAT_SECONDS + 1)
        code, advice = self._restart()
        name = f"process {ended['process']} on {ended['host']}"
        if ended["code"] is None:
            self._record(ended["process"], ended["host"])
            leave(f"{name} has gone ({ended['why']}); {advice}", code)
        leave(f"{name} has ended: {ended['why']}", ended["code"])

    def _leave_lost(self) -> None:
        """The first process cannot be reached, or JAX has given up another before we did."""
        code, advice = self._restart()
        if self._number == 0:
            leave(f"a process that JAX names above has gone; {advice}", code)
        host = self._hosts.get(0, "its host")
        self._record(0, host)
        leave(f"process 0 on {host} has gone, or those that JAX names above; {advice}", code)

    def _record(self, number: int, host: str) -> None:
        """By one process: the first one that is left."""
        if self._number == (1 if number == 0 else 0):
            record(self._directory, {"process": number, "host": host, "what": "has gone"})

    def _watch_for_abort(self) -> None:
        """JAX aborts a process that lost the first one, within a lock that the board needs too."""
        while not self._closed.wait(0.25):
            asked = self._asked
            if asked and time.monotonic() - asked > LOCKED_SECONDS and aborting.is_under_way():
                self._leave_lost()


@contextmanager
def watched(board: Board | None, restart: Restart, directory: Path) -> Iterator[Peers | None]:
    """Around a run; nothing is watched where a process is alone, and has no board."""
    if board is None:
        yield None
        return
    peers = Peers(board, restart, directory)
    try:
        with peers.blamed():
            yield peers
    finally:
        peers.close()
