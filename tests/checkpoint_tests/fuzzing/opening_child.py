"""Opens checkpoints as a user would, one after the other, and tells how each went.

Reads a line {"path", "kind", "limit"} of JSON for each from standard input, and answers with a line
of `Outcome`'s fields. `limit` is how many bytes it may allocate for one.
"""

import gc
import json
import logging
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from l32jax import api
from l32jax.checkpoint import adapters, peft
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.formats import open_checkpoint
from l32jax.data.chat import Message, encode_dialog
from l32jax.data.tokenizer import Tokenizer
from l32jax.data.tokenizer_export import gguf_metadata, hugging_face_files
from l32jax.errors import InputError
from tests.checkpoint_tests.fuzzing.seeds import TEXT, VISION

MAX_READ = 64 << 20  # of values; a model that is larger is opened, but not read
HELLO = [Message("user", "Hello <|eot_id|> 123"), Message("assistant", "Hi.")]


def opened(path: Path, kind: str) -> None:
    match kind:
        case "model":
            checkpoint = open_checkpoint(path)
            api.tokenizer_of(checkpoint, path)
            _read(checkpoint.slices)
        case "tokenizer":
            tokenizer = api.tokenizer_of(open_checkpoint(path), path)
            if tokenizer is not None:
                _use(tokenizer)
        case "adapter":
            _read(adapters.open_ours(path)[0].slices)
        case "peft-text" | "peft-vision":
            _read(peft.open_peft(path, TEXT if kind == "peft-text" else VISION).slices)


def _read(slices: Slices) -> None:
    homes = list(slices.homes())
    size = sum(
        int(np.prod(slices.shape(home))) * slices.dtypes[home.path].itemsize for home in homes
    )
    for home in homes if size <= MAX_READ else []:
        array = np.asarray(slices.read(home, slice(None)))
        assert array.shape == slices.shape(home) and array.dtype == slices.dtypes[home.path], home
        array.astype(np.float32).sum()  # touches every number


def _use(tokenizer: Tokenizer) -> None:
    """What conversion and chat do with one; each may refuse what it has no way to say."""
    vocabulary = tokenizer.vocabulary
    assert tokenizer.decode(tokenizer.encode("\u00fc 12\n the")) is not None
    uses = (
        lambda: hugging_face_files(vocabulary),
        lambda: gguf_metadata(vocabulary),
        lambda: encode_dialog(tokenizer, HELLO),
        tokenizer.to_bytes,
    )
    refusals = []
    for use in uses:
        try:
            use()
        except InputError as error:
            if "\n" in str(error):
                raise
            refusals.append(error)


def complaint(error: BaseException, path: Path) -> str | None:
    """What is wrong with an error as an answer to a bad file."""
    if not isinstance(error, InputError):
        return f"{type(error).__name__}: {str(error)[:300]}"
    text = str(error)
    if not text.isprintable():
        return f"more than a line, or codes for a terminal: {text[:300]!r}"
    if len(text) > 1500 + len(str(path)):
        return f"{len(text)} characters: {text[:200]!r}"
    if str(path) not in text:
        return f"does not name the file: {text[:300]!r}"
    return None


def examine(path: Path, kind: str, limit: int) -> dict[str, Any]:
    gc.collect()
    gc.freeze()  # what is left now, mostly jax's own, is not looked at again
    before, begin, wall = _reset_peak(), time.process_time(), time.perf_counter()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + limit, hard))
    outcome: dict[str, Any] = {"refusal": None, "complaint": None, "where": None}
    try:
        opened(path, kind)
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        outcome["complaint"] = complaint(error, path)
        outcome["refusal"] = str(error)[:500].replace(str(path), "PATH")
        outcome["where"] = _where(error)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    outcome["seconds"] = time.process_time() - begin
    outcome["wall"] = time.perf_counter() - wall
    outcome["grown"] = _status("VmHWM") - before
    return outcome


def _where(error: BaseException) -> str:
    """The last line of ours that it came from."""
    place, trace = "?", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "l32jax" in file and "tests" not in file.rpartition("l32jax")[2]:
            place = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    logging.disable(logging.CRITICAL)
    sys.stdin.reconfigure(encoding="utf-8")
    for line in sys.stdin:
        request = json.loads(line)
        outcome = examine(Path(request["path"]), request["kind"], request["limit"])
        print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
    main()
