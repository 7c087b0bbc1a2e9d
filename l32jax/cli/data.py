"""The verbs about data."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from l32jax.cli import INTERRUPTED, runs
from l32jax.cli.bar import Bar
from l32jax.cli.stopping import stoppable
from l32jax.config_text import override
from l32jax.errors import InputError

if TYPE_CHECKING:
    from l32jax.data.prepare.config import PrepareConfig
    from l32jax.data.prepare.runners import Runner
    from l32jax.data.tokenizer import Tokenizer
    from l32jax.run_config import TrainConfig

Words = Annotated[
    tuple[str, ...],
    arg(metavar="CONFIG.py|SOURCE... OUTPUT [FIELD=VALUE ...]", help_behavior_hint=""),
]


def prepare(
    what: Words,
    /,
    *,
    tokenizer: Annotated[str | None, arg(metavar="PATH")] = None,
    workers: int = 0,
    beam: Annotated[str | None, arg(metavar="RUNNER")] = None,
    beam_options: str = "",
    ray: Annotated[str | None, arg(metavar="ADDRESS")] = None,
) -> int:
    """Makes a folder of shuffled samples, ready to be trained on, from files of records.

    Records are judged by their text, language and images, shrunk to what a model can see, freed of
    near-duplicates, and tokenised. The folder is whole when it has an index.json; what is done by
    then is kept, and the same command goes on after it was stopped (exit code 75) or killed.

    Examples:
      l32jax data prepare captions.jsonl 'pages/*.parquet' prepared --tokenizer Llama-3.2-1B
      l32jax data prepare web.tar prepared languages="('en','de')" --tokenizer Llama-3.2-1B
      l32jax data prepare code.jsonl prepared text=None num_shards=64 --tokenizer Llama-3.2-1B
      l32jax data prepare my_data.py duplicates.image_distance=3 --workers 8
      l32jax data prepare my_data.py --ray local
      l32jax data prepare my_data.py --beam DataflowRunner --beam-options '--project=my --region=eu'

    Args:
      what: sources and the folder to make; or a Python file whose `config()` returns a
        PrepareConfig. Then fields to change.
      tokenizer: its file or folder, or a model's folder.
      workers: processes of this machine; by default one for each of its cores.
      beam: a runner of Apache Beam, such as DirectRunner, in place of processes.
      beam_options: options of the pipeline.
      ray: the address of a Ray cluster, or local, in place of processes.
    """
    if beam is not None and ray is not None:
        raise InputError("--beam and --ray: only one of them can do the work; leave one out")
    from l32jax.data.prepare.run import prepare as run

    config = read_config(what, tokenizer)
    try:
        with stoppable(), closing(Bar()) as bar:
            index = run(config, _runner(workers, beam, beam_options, ray), bar)
    except KeyboardInterrupt:
        print(
            "l32jax: stopped; what is done is kept, and the same command goes on", file=sys.stderr
        )
        return INTERRUPTED
    Console().print(_table(index))
    print(f"{config.output} is written: name it in a mixture.")
    return 0


def inspect(
    config: runs.File,
    overrides: runs.Overrides = (),
    /,
    *,
    stage: int = 1,
    rows: int = 4,
    output: Annotated[Path, arg(metavar="FILE")] = Path("rows.html"),
) -> int:
    """Shows rows of a stage as its training will see them, on one sheet.

    It has the text of each document with what of it is learned, the pictures as they are cut into
    tiles, what each token sees, how full the rows are, and which records were skipped. No weights
    are read.

    Examples:
      l32jax data inspect configs/easy_vqa_tiny.py --stage 2
      l32jax data inspect my_run.py stages.0.data.length=4096 --rows 8 --output sheet.html
      l32jax data inspect my_run.py --output sheet.png

    Args:
      config: a Python file with a function `config()` that returns a TrainConfig.
      overrides: fields to change, such as stages.0.data.packing=first_fit.
      stage: its number; the first is 1.
      rows: how many to show.
      output: the sheet to write, a page (.html) or a picture (.png).
    """
    from l32jax.data.sheet.look import look

    run = runs.read_config(config, overrides)
    if not 1 <= stage <= len(run.stages):
        raise InputError(f"--stage {stage}: the run has stages 1 to {len(run.stages)}")
    if rows < 1:
        raise InputError(f"--rows {rows}: give at least 1")
    if output.suffix not in (".html", ".png") or not output.parent.is_dir():
        raise InputError(
            f"--output {str(output)!r}: give a file that ends with .html or .png, in a folder that "
            "is there"
        )
    number, chosen = stage - 1, run.stages[stage - 1]
    sheet = look(
        chosen.data,
        run.model_of(number),
        _tokenizer(run),
        seed=run.seed + number,
        count=rows,
        title=f"{config}: stage {stage}, {chosen.name}",
    )
    if output.suffix == ".html":
        from l32jax.data.sheet.page import page

        output.write_text(page(sheet), encoding="utf-8")
    else:
        from l32jax.data.sheet.poster import poster

        poster(sheet).save(output)
    print(f"{output} shows {rows} rows.")
    return 0


def read_config(words: Sequence[str], tokenizer: str | None) -> "PrepareConfig":
    """What the command line says to do."""
    from l32jax.data.prepare.config import PrepareConfig

    names = [word for word in words if not _is_override(word)]
    if len(names) == 1 and names[0].endswith(".py"):
        config = runs.execute(Path(names[0]))
        if not isinstance(config, PrepareConfig):
            raise InputError(
                f"config() in {names[0]}: gives {type(config).__name__}, not a PrepareConfig"
            )
        if tokenizer is not None:
            config = override(config, f"tokenizer={tokenizer}")
    elif len(names) < 2:
        raise InputError("data to prepare: give sources and the folder to make, or a CONFIG.py")
    elif tokenizer is None:
        raise InputError("tokenizer of the samples: missing; give --tokenizer PATH")
    else:
        *sources, output = names
        config = PrepareConfig(sources=tuple(sources), output=output, tokenizer=tokenizer)
    for word in words:
        if _is_override(word):
            config = override(config, word)
    return config


def _tokenizer(run: "TrainConfig") -> "Tokenizer":
    """That of a run: its own, that of the model it starts from, or the one that needs no file."""
    from l32jax.api import tokenizer_of
    from l32jax.checkpoint.formats import open_checkpoint
    from l32jax.data.tokenizer import Tokenizer
    from l32jax.generate.model import require_matching
    from l32jax.presets import PRESETS

    start = run.start_from
    if run.tokenizer is not None:
        found = Tokenizer.from_file(run.tokenizer)
    elif start is None or start in PRESETS:
        found = Tokenizer.bytes_only()
    else:
        found = tokenizer_of(open_checkpoint(start, verified=False), start)
    if found is None:
        raise InputError(f"tokenizer in {start}: there is none; set `tokenizer` of the run")
    require_matching(found, run.model, str(run.tokenizer or start))
    return found.with_image_token() if run.model.vision is not None else found


def _is_override(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and name.replace(".", "").isidentifier()


def _runner(workers: int, beam: str | None, beam_options: str, ray: str | None) -> "Runner":
    from l32jax.data.prepare.runners import on_beam, on_processes, on_ray

    if beam is not None:
        return partial(on_beam, runner=beam, options=shlex.split(beam_options))
    if ray is not None:
        return partial(on_ray, address=ray)
    return partial(on_processes, workers=workers or len(os.sched_getaffinity(0)))


def _table(index: dict[str, Any]) -> Table:
    table = Table("", "number")
    table.columns[1].justify = "right"
    for name, count in index["sources"]:
        table.add_row(f"records of {name}", f"{count:,}")
    for why, count in index["removed"].items():
        table.add_row(f"removed: {why}", f"{count:,}")
    table.add_section()
    for name, value in index["statistics"].items():
        if isinstance(value, dict):
            table.add_section()
            for key, count in value.items():
                table.add_row(f"{name.replace('_', ' ')}: {key}", f"{count:,}")
        else:
            table.add_row(name, f"{value:,}")
    return table
