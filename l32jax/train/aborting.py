"""A moment between the abort of a process, which JAX's C++ decides on, and its death.

JAX aborts a process that has lost the first one of its run, with a trace that names nobody. Python
cannot run in the handler of a signal that a thread of C++ raises. But its other threads run on
while that one is in a handler: here in one that sleeps.
"""

import ctypes
import signal
from pathlib import Path

BIT = 1 << (signal.SIGABRT - 1)


def delay() -> None:
    """From now on an abort takes six seconds: the number of the signal is what `sleep` is given."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def is_under_way() -> bool:
    """Whether a thread is in the handler: there, the signal is blocked. False without /proc."""
    return any(_blocks(status) for status in Path("/proc/self/task").glob("*/status"))


def _blocks(status: Path) -> bool:
    try:
        lines = status.read_text().splitlines()
    except OSError:  # a thread that has ended
        return False
    return any(int(line.split()[1], 16) & BIT for line in lines if line.startswith("SigBlk"))
