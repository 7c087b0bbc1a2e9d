"""The verb that converts checkpoints."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tyro.conf import arg

from l32jax.cli import INTERRUPTED
from l32jax.cli.stopping import stoppable

Source = Annotated[str, arg(metavar="SRC")]
Destination = Annotated[str, arg(metavar="DST")]


def convert(
    source: Source,
    destination: Destination,
    /,
    *,
    to: Literal["orbax", "hf", "meta", "gguf", "safetensors", "peft"] | None = None,
    dtype: Literal["float32", "float16", "bfloat16", "q8_0", "q4_0"] | None = None,
    adapter: Annotated[Path | None, arg(metavar="PATH")] = None,
    base: Annotated[str | None, arg(metavar="MODEL")] = None,
    tokenizer: Annotated[Path | None, arg(metavar="PATH")] = None,
    ranks: int | None = None,
    verify: bool = False,
    verify_logits: bool = False,
    resume: bool = False,
) -> int:
    """Converts a checkpoint into another format.

    Formats are Orbax (ours), Hugging Face, Meta, GGUF and a safetensors file; that of SRC is told
    by its content. LoRA that SRC was trained with is merged; with --to peft it is written alone, as
    PEFT's folder. Memory stays below 2 GB, however large the model. DST appears when
    all of it is written; until then it is DST.unfinished, and a conversion that was stopped (exit
    code 75) or killed goes on with --resume.

    Examples:
      l32jax convert Llama-3.2-1B-Instruct llama-1b.orbax
      l32jax convert Llama-3.2-11B-Vision/original llama-11b-hf --to hf --verify
      l32jax convert runs/quickstart quickstart-hf --to hf --dtype bfloat16
      l32jax convert Llama-3.2-3B-Instruct llama-3b.gguf --dtype q8_0
      l32jax convert Llama-3.2-1B gs://bucket/llama-1b
      l32jax convert Llama-3.2-1B merged-hf --to hf --adapter my-lora
      l32jax convert runs/my-lora my-lora --to peft
      l32jax convert my-lora my-lora.safetensors --base Llama-3.2-1B

    Args:
      source: a folder of Hugging Face's or Meta's, a .gguf or .safetensors file, a run or a stage.
      destination: a path that does not exist yet; with orbax also gs://bucket/path, s3://bucket/path.
      to: the format; by default what DST's name ends with (.gguf, .safetensors), else orbax.
      dtype: of the weights, by default that of SRC; q8_0 and q4_0 are for GGUF.
      adapter: a LoRA adapter (PEFT's folder, or our file) to merge into the weights.
      base: the model that SRC, an adapter itself, belongs to; with --to peft, its name for PEFT.
      tokenizer: its file or folder; by default SRC's own.
      ranks: how many files Meta's format is split into; by default as Meta does.
      verify: read both sides again, and compare every tensor.
      verify_logits: run both on a prompt, one after the other, and compare.
      resume: go on with a conversion that was stopped.
    """
    # Accelerators have nothing to do here, and to look for them is to take them from others.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Tensors are side by side already; to numpy's threads within each, merging loses tenfold.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from l32jax.checkpoint.engine.compare import Differs
    from l32jax.checkpoint.engine.transfer import Interrupted
    from l32jax.conversion.convert import convert as run

    try:
        with stoppable(), _Bar() as bar:
            notes = run(
                source,
                destination,
                to=to,
                dtype=dtype,
                adapter=adapter,
                base=base,
                tokenizer=tokenizer,
                ranks=ranks,
                verify=verify,
                verify_logits=verify_logits,
                resume=resume,
                progress=bar,
            )
    except (Interrupted, KeyboardInterrupt):
        if not os.path.exists(destination):  # else it came after the last moment to stop
            print(
                "l32jax: stopped; what is done is kept, and the same command with --resume goes on",
                file=sys.stderr,
            )
            return INTERRUPTED
        notes = []
    except Differs as difference:
        print(
            f"l32jax: error: {difference}; {destination} was not made: remove what is unfinished, "
            "and convert it again",
            file=sys.stderr,
        )
        return 1
    for note in notes:
        print(f"l32jax: {note}", file=sys.stderr)
    print(f"{destination} is written.")
    return 0


class _Bar:
    """Bytes, bytes a second and the time that is left, on stderr."""

    def __init__(self):
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        if self._task is not None:  # it would print an empty line
            self._bar.stop()

    def begin(self, what: str, total: int) -> None:
        self._bar.start()
        self._task = self._bar.add_task(what, total=total)

    def advance(self, amount: int) -> None:
        assert self._task is not None
        self._bar.advance(self._task, amount)
