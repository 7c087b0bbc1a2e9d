"""The one error that people can cause: a bad file, name or value, told in one line."""


class InputError(ValueError):
    """What is wrong, where, why, and what to do; the command line prints it and exits with 2."""


def one_line(error: BaseException) -> str:
    """The begin of what another's error says, which may quote a file: so no codes for terminals."""
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in first[:200])
