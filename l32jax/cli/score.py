"""The verb that leaves in data what models say of it."""

import sys
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from l32jax.cli import INTERRUPTED
from l32jax.cli.stopping import stoppable
from l32jax.errors import InputError

Words = Annotated[tuple[str, ...], arg(metavar="SOURCE... OUTPUT", help_behavior_hint="")]
Teachers = Annotated[
    tuple[str, ...], arg(name="teacher", metavar="MODEL[=WEIGHT]"), UseAppendAction
]


def score(
    what: Words,
    /,
    *,
    teachers: Teachers,
    top_k: int = 64,
    temperature: float = 1.0,
    logs: Literal["float32", "bfloat16", "int8"] = "bfloat16",
    length: int = 2048,
    rows: int = 8,
    max_images: int = 0,
    max_tiles: int = 4,
    max_pairs: int = 0,
    dtype: Literal["float32", "bfloat16"] | None = None,
    part: str = "0/1",
) -> int:
    """Writes sources with what models say of their tokens, to be learned from.

    That is the log-probability of each token, for DPO whose reference is "data"; and the likeliest
    words in its place, for a distillation with this --top-k. OUTPUT is prepared data: name it in a
    mixture. It has an index.json when it is whole; what is done by then is kept, and the same
    command goes on after it was stopped (exit code 75) or killed.

    Examples:
      l32jax data score pages.jsonl scored --teacher Llama-3.1-8B
      l32jax data score prepared scored --teacher Llama-3.1-8B=0.5 --teacher Llama-3.1-70B=0.5
      l32jax data score pairs.jsonl scored --teacher my-sft --top-k 0 --max-pairs 32
      l32jax data score photos.tar scored --teacher Llama-3.2-90B-Vision --max-images 8 --part 3/16

    Args:
      what: sources, and the folder to make.
      teachers: models in any format, as one mixture with these weights.
      top_k: the likeliest words to keep; 0 for none.
      temperature: of their probabilities.
      logs: in which their log-probabilities are kept.
      length: tokens of the rows that models see at once.
      rows: that many at a time.
      max_images: of a row.
      max_tiles: of an image.
      max_pairs: comparisons of a row, if the sources have answers to compare.
      dtype: of weights and computation; bfloat16 by default, on CPU float32.
      part: of the work, as number/parts; processes that have one each share it.
    """
    *sources, output = what
    if not sources or not teachers:
        raise InputError("data to score: give sources, the folder to make, and a --teacher")

    from l32jax.align.left_targets import LeftConfig, leave_targets
    from l32jax.api import load
    from l32jax.run_config import DataConfig
    from l32jax.sharding import make_mesh

    config = LeftConfig(
        data=DataConfig(
            mixture=tuple((source, 1.0) for source in sources),
            batch_size=rows,
            length=length,
            max_images=max_images,
            max_tiles=max_tiles,
            max_pairs=max_pairs,
        ),
        output=output,
        teachers=tuple(map(_weighted, teachers)),
        top_k=top_k,
        temperature=temperature,
        logs=logs,
        part=_part(part),
    )
    mesh = make_mesh()
    try:
        with stoppable():
            models = [load(path, mesh=mesh, dtype=dtype) for path, _ in config.teachers]
            index = leave_targets(config, models)
    except KeyboardInterrupt:
        print(
            "l32jax: stopped; what is done is kept, and the same command goes on", file=sys.stderr
        )
        return INTERRUPTED
    if index is None:
        print(f"This part of {output} is done; others are not.")
        return 0
    print(f"{output} is written, {sum(index['shards'].values()):,} samples: name it in a mixture.")
    if top_k:
        print(f"The {top_k} words have {index['teacher_mass']:.2%} of the probability on average.")
    return 0


def _weighted(teacher: str) -> tuple[str, float]:
    name, equals, weight = teacher.rpartition("=")
    try:
        return (name, float(weight)) if equals else (teacher, 1.0)
    except ValueError:
        raise InputError(
            f"--teacher {teacher!r}: its weight is no number; give one, as in Llama-3.1-8B=0.5"
        ) from None


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not slash or not number.isdecimal() or not parts.isdecimal():
        raise InputError(f"--part {text!r}: give number/parts, as 0/4 to 3/4")
    return int(number), int(parts)
