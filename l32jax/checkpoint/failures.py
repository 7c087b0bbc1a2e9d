"""How a save fails: in one error of one line, although Orbax and TensorStore have more to say."""

import functools
import logging
import os
import re
import sys

from l32jax.errors import one_line


class SaveError(OSError):
    """A step could not be written; what was written of it is removed, older steps are as before."""


class ReadError(OSError):
    """What is remote could not be reached; nothing is known to be wrong with it."""


def reason(error: BaseException) -> str:
    """In a few words; TensorStore tells a system error in a line of many hundred characters."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return one_line(error)


@functools.cache  # once per process
def quieten_orbax() -> None:
    """A failed save is one SaveError; Orbax, and what it leaves behind, would print pages as well.

    It logs tracebacks; it abandons tasks, which asyncio reports; and it closes the event loop that
    TensorStore's callbacks still want to call, which Python reports for want of a caller.
    """

    def is_ours(record: logging.LogRecord) -> bool:
        return "/orbax/" not in record.pathname and "/orbax/" not in record.getMessage()

    logging.getLogger("absl").addFilter(is_ours)
    logging.getLogger("asyncio").addFilter(is_ours)
    previous = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
