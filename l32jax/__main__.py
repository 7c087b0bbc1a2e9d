"""The command line; `l32jax` is `python -m l32jax`.

Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted but saved (run it again to go on),
130 stopped by Ctrl-C, 141 nobody reads the output any more.

Compiled programs are kept in ~/.cache/l32jax/xla, or where JAX_COMPILATION_CACHE_DIR says, so that
the second run of a command starts quickly.
"""

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from l32jax.errors import InputError


class Verb(NamedTuple):
    """`function` is module:name below l32jax.cli; `summary` the first line of its docstring."""

    function: str
    summary: str


# Repeated here, so that `l32jax --help` imports neither jax nor tyro.
VERBS = {
    "quickstart": Verb("runs:quickstart", "Trains a tiny vision model here and now, and asks it."),
    "models": Verb("models:models", "Lists the models that can be made by name, and their sizes."),
    "generate": Verb("ask:generate", "Answers one prompt, word by word as the words come."),
    "chat": Verb("ask:chat", "Talks with a model, turn by turn."),
    "train": Verb("runs:train", "Trains what a config file describes, or goes on with it."),
    "sample": Verb(
        "sample:sample",
        "Draws many answers to each prompt, and keeps the best as data to tune with.",
    ),
    "rounds": Verb("rounds:rounds", "Samples, scores and learns from the best, round after round."),
    "judge": Verb(
        "judge:judge", "Asks a reward model which answers are better, and how sure it is."
    ),
    "plan": Verb(
        "plan:plan",
        "Plans a run for a machine that is not here: does it fit, and how fast does it go?",
    ),
    "runs": Verb(
        "runs:list_runs",
        "Lists the runs below a folder: how far they are, how they do, and whether they are alive.",
    ),
    "convert": Verb("convert:convert", "Converts a checkpoint into another format."),
    "prune": Verb(
        "prune:prune", "Makes a smaller model out of a larger one, to be distilled into."
    ),
    "data prepare": Verb(
        "data:prepare",
        "Makes a folder of shuffled samples, ready to be trained on, from files of records.",
    ),
    "data score": Verb(
        "score:score", "Writes sources with what models say of their tokens, to be learned from."
    ),
    "data inspect": Verb(
        "data:inspect", "Shows rows of a stage as its training will see them, on one sheet."
    ),
    "config show": Verb("runs:show_config", "Prints the config that a run would have, as JSON."),
    "checkpoint verify": Verb("runs:verify", "Verifies every byte of a checkpoint by its digests."),
}
COMPUTING = {
    "quickstart", "generate", "chat", "train", "score", "sample", "rounds", "judge", "prune",
}  # fmt: skip
GROUPS = {name.split()[0] for name in VERBS if " " in name}


def command() -> int:
    """The process `l32jax`: starts over in huge pages first, where Linux has them on request.

    On CPU every step's buffers come fresh from malloc, which can only be told so from outside: they
    then cost some hundred page faults instead of tens of thousands.
    """
    computes = not COMPUTING.isdisjoint(sys.argv) and {"-h", "--help"}.isdisjoint(sys.argv)
    if computes and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; what people can cause is told in one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    try:
        code = _run(arguments[debug:])
        sys.stdout.flush()  # here, where a broken pipe is caught
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except KeyboardInterrupt:
        if debug:
            raise
        return 130
    except (InputError, OSError) as error:
        if debug:
            raise
        print(f"l32jax: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _run(arguments: list[str]) -> int:
    words = arguments[1:] if arguments[:1] and arguments[0] in GROUPS else arguments
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, rest = _split(arguments)
    logging.basicConfig(format="l32jax: %(message)s")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache() / "xla"))
    module, _, function = VERBS[name].function.partition(":")
    return _call(getattr(importlib.import_module(f"l32jax.cli.{module}"), function), name, rest)


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = (f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    return "\n".join(
        (
            "usage: l32jax [--debug] VERB ...",
            "\nTrain, adapt, run and study the whole Llama 3.2 family in JAX.\n",
            *lines,
            "\n`l32jax VERB --help` has the options of a verb, and examples.",
            "--debug shows where an error comes from.",
        )
    )


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and what follows it."""
    count = 2 if arguments[0] in GROUPS else 1
    name = " ".join(arguments[:count])
    if name not in VERBS:
        from l32jax.config_text import did_you_mean

        raise InputError(f"verb {name!r} of l32jax: there is none{did_you_mean(name, VERBS)}")
    return name, arguments[count:]


def _call(function: Callable[..., int], name: str, arguments: list[str]) -> int:
    import tyro

    description, _, _ = inspect.getdoc(function).partition("\n\nArgs:")  # type: ignore[union-attr]
    return tyro.cli(
        function,
        prog=f"l32jax {name}",
        description=description,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "l32jax"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n"))


if __name__ == "__main__":
    sys.exit(command())
