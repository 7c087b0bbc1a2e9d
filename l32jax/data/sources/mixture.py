"""The batches of a stage, from the names of its sources."""

from l32jax.config import LlamaConfig
from l32jax.data.batches import Batches, make_batches
from l32jax.data.beside import Beside
from l32jax.data.features import Features
from l32jax.data.packing import RowShape
from l32jax.data.rows import VisionShape
from l32jax.data.samples import mirror
from l32jax.data.sources.open import open_source
from l32jax.data.streams import Rows
from l32jax.data.tokenizer import Tokenizer
from l32jax.objective_config import NextToken, Objective
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
    names, weights = zip(*data.mixture, strict=True)
    return make_batches(
        [open_source(name, tokenizer, with_images=shape.vision is not None) for name in names],
        weights,
        rows,
        batch_size=data.batch_size,
        seed=seed,
        max_bad=data.max_bad,
        process_index=process_index,
        process_count=process_count,
        workers=data.workers,
    )
