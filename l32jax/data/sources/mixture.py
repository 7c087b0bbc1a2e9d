"""The batches of a stage, from the names of its sources."""

from collections.abc import Sequence
from pathlib import Path

from l32jax.config import LlamaConfig
from l32jax.data.batches import Batches, make_batches
from l32jax.data.beside import Beside
from l32jax.data.features import Features
from l32jax.data.packing import RowShape
from l32jax.data.records import Bad
from l32jax.data.rows import VisionShape
from l32jax.data.samples import Sample, mirror
from l32jax.data.shards import read_index
from l32jax.data.sources.open import is_prepared, open_source
from l32jax.data.streams import Rows
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.objective_config import Distill, NextToken, Objective, reads_targets
from l32jax.run_config import DataConfig

NEXT_TOKEN = NextToken()


def row_shape(data: DataConfig, model: LlamaConfig, objective: Objective = NEXT_TOKEN) -> RowShape:
    """What a row of a stage holds."""
    vision = None
    if data.max_images:
        vision = VisionShape.of(
            model,
            max_images=data.max_images,
            max_tiles=data.max_tiles,
            slots=data.vision_tiles,
        )
    beside = Beside.of(objective, data.max_pairs)
    return RowShape(length=data.length, vision=vision, beside=beside)


def open_sources(data: DataConfig, tokenizer: Tokenizer) -> list[Sequence[Sample | Bad]]:
    """Those of a mixture, in order."""
    seeing = bool(data.max_images)
    return [open_source(name, tokenizer, with_images=seeing) for name, _ in data.mixture]


def _require_targets(name: str, objective: Objective) -> None:
    """InputError unless models have left in a source what is learned from it."""
    if not reads_targets(objective):
        return
    wanted = {}
    if isinstance(objective, Distill):
        wanted = {"top_k": objective.top_k, "temperature": objective.temperature}
    found = read_index(Path(name)).get("targets") if is_prepared(name) else None
    if found is None:
        raise InputError(
            f"source {name!r} in the mixture: no model has left anything in it; write it with "
            "`l32jax data score`"
        )
    if wrong := {key: found.get(key) for key, value in wanted.items() if found.get(key) != value}:
        raise InputError(
            f"source {name!r} in the mixture: it was written with {wrong}, and the objective has "
            f"{wanted}; change that, or write it again"
        )


def open_batches(
    data: DataConfig,
    model: LlamaConfig,
    tokenizer: Tokenizer,
    *,
    objective: Objective = NEXT_TOKEN,
    seed: int,
    process_index: int,
    process_count: int,
) -> Batches:
    """The endless shuffled batches of a training stage."""
    shape = row_shape(data, model, objective)
    rows = Rows(
        shape=shape,
        packing=data.packing,
        open_rows=data.packing_rows,
        change=mirror if data.mirror_images else None,
        features=None if data.features is None else Features(data.features),
    )
    for name, _ in data.mixture:
        _require_targets(name, objective)
    return make_batches(
        open_sources(data, tokenizer),
        [weight for _, weight in data.mixture],
        rows,
        batch_size=data.batch_size,
        seed=seed,
        max_bad=data.max_bad,
        process_index=process_index,
        process_count=process_count,
        workers=data.workers,
    )
