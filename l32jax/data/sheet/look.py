"""The first rows of a stage, made as training makes them."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice

from l32jax.config import LlamaConfig
from l32jax.data import batches
from l32jax.data.records import too_many_bad
from l32jax.data.rows import Batch
from l32jax.data.sheet.rows import SeenRow, Sheet, see_row
from l32jax.data.sources.mixture import NEXT_TOKEN, open_batches
from l32jax.data.tokenizer import Tokenizer
from l32jax.objective_config import Objective
from l32jax.run_config import DataConfig


def look(
    data: DataConfig,
    model: LlamaConfig,
    tokenizer: Tokenizer,
    *,
    objective: Objective = NEXT_TOKEN,
    seed: int,
    count: int,
    title: str,
) -> Sheet:
    """The first row of each of the first `count` batches of a stage that has this seed.

    One stream of rows alone is read for that, whatever the size of batches. Any share of bad
    records is put up with, to be looked at. Pictures are shown whether their features are used.
    """
    patient = dataclasses.replace(data, workers=0, max_bad=1.0, features=None)
    opened = open_batches(
        patient,
        model,
        tokenizer,
        objective=objective,
        seed=seed,
        process_index=0,
        process_count=data.batch_size,
    )
    with closing(opened), _told() as messages:
        rows = [_first(batch, tokenizer, model) for batch in islice(opened, count)]
        facts = _facts(data, model, rows, opened.used, opened.bad)
    named = [(f"row 1 of step {step}", row) for step, row in enumerate(rows, 1)]
    return Sheet(title, facts, tuple(messages), tuple(named))


def _first(batch: Batch, tokenizer: Tokenizer, model: LlamaConfig) -> SeenRow:
    return see_row({name: array[0] for name, array in batch.items()}, tokenizer, model.vision)


def _facts(
    data: DataConfig, model: LlamaConfig, rows: list[SeenRow], used: int, bad: int
) -> tuple[tuple[str, str], ...]:
    shape = f"{data.length} tokens"
    filled = f"{sum(row.used for row in rows) / (data.length * len(rows)):.1%} of the tokens"
    if data.max_images and model.vision is not None:
        slots = sum(len(row.owners) for row in rows)
        tiles = sum(owner is not None for row in rows for owner in row.owners)
        images = sum(len(row.pictures) for row in rows)
        shape += f", {data.max_images} images, {slots // len(rows)} tiles"
        shape += f" of {model.vision.image_size} pixels"
        filled += f", {tiles / slots:.1%} of the tiles"
        filled += f", {images / (data.max_images * len(rows)):.1%} of the images"
    learned = sum(passage.learned for row in rows for passage in row.passages)
    tokens = sum(row.used for row in rows)
    total = sum(share for _, share in data.mixture)
    mixture = ", ".join(f"{name} ({share / total:.0%})" for name, share in data.mixture)
    records = f"{used} in these rows, {bad} skipped"
    if too_many_bad(bad, used + bad, data.max_bad):
        records += f": more than max_bad={data.max_bad} lets training pass"
    return (
        ("mixture", mixture),
        ("row", f"{shape}; {data.batch_size} rows a batch"),
        ("packing", f"{data.packing}: {filled} of these rows are used"),
        ("learned", f"{learned} of {tokens} tokens"),
        ("samples", records),
    )


@contextmanager
def _told() -> Iterator[list[str]]:
    """What the batches have to say while they are made, such as which records are skipped."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    listener = Listener()
    batches.logger.addHandler(listener)
    try:
        yield messages
    finally:
        batches.logger.removeHandler(listener)
