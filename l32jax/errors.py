"""The one error that people can cause: a bad file, name or value, told in one line."""


class InputError(ValueError):
    """What is wrong, where, why, and what to do; the command line prints it and exits with 2."""
