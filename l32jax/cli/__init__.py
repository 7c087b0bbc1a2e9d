"""The verbs of the command line, each a thin function; `__main__` finds and runs them."""

INTERRUPTED = 75  # EX_TEMPFAIL: launchers start the command again
