"""Stopping a run because somebody asks for it: in all its processes, after the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from l32jax.train.board import Board

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STEPS_AHEAD = 2


class Agreed(Exception):
    """Raised by all processes of a run at the same place: none of them is to blame."""


class Interrupted(Agreed):
    """The run was asked to stop and has saved; the same command goes on with it."""

    def __init__(self, stage: str, step: int):
        super().__init__(
            f"saved stage {stage!r} at step {step}; the same command goes on from there"
        )


class Stop:
    """Asked whether to stop, all processes say the same, though the signal came to one of them.

    Asking does not wait for others. A process that has dispatched a step has seen the end of the
    one before, which others had a part in: nobody is further ahead than one step. So the process
    that gets a signal writes down a step that nobody can have passed by then, and all who come to
    it read that.
    """

    def __init__(self, board: Board | None):
        self._board = board
        self._received = self._told = False
        self._steps = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM are noted; a second Ctrl-C ends the process at once."""

        def note(number, _):
            self._received = True
            signal.signal(number, signal.SIG_DFL)

        old = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def after_step(self) -> bool:
        """To be asked once after every step that was dispatched, by every process."""
        self._steps += 1
        if self._board is None:
            return self._received
        if self._received and not self._told:
            self._board.write_first("stop", str(self._steps + STEPS_AHEAD))
            self._told = True
        last = self._board.read("stop")
        return last is not None and self._steps >= int(last)

    def outside_steps(self) -> bool:
        """Of work that processes do each for itself: the first one decides, and others hear it."""
        if self._board is None:
            return self._received
        if self._received and not self._told:
            self._board.write_first("wish", "")
            self._told = True
        if jax.process_index() == 0 and self._board.read("wish") is not None:
            self._board.write_first("stopped", "")
        return self._board.read("stopped") is not None
