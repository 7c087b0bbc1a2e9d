"""The stages in which the family was pretrained, with the numbers that are published.

Sources: "The Llama 3 Herd of Models", sections 3.4 (text) and 7.2 to 7.4 (vision). What the paper
leaves open is said to be ours. Functions give stages, and `dataclasses.replace` makes
others of them; a config in configs/ is a chain of them, and one resumable run.
"""

from collections.abc import Sequence
from dataclasses import replace

from l32jax.config import LlamaConfig, Part
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig

SEEING: tuple[Part, ...] = ("vision_tower", "adapter")  # the language model is frozen

# Of the text of pretraining, in folders that `l32jax data prepare` made.
TEXT_SHARES = (
    ("data/general", 0.50),
    ("data/reasoning", 0.25),
    ("data/code", 0.17),
    ("data/multilingual", 0.08),
)

# Six stages from 8K to 128K; which lengths lie between is ours.
LONG_LENGTHS = (16_384, 32_768, 49_152, 65_536, 98_304, 131_072)


def vision_stage1(data: DataConfig, *, num_steps: int, peak_lr: float = 1e-3) -> StageConfig:
    """Image-text pairs, 16,384 images a step, against the frozen language model.

    Published: the rate as printed ("10 x 10^-4"), its cosine, weight decay 0.01. Ours: the end of
    the cosine at a tenth, and the warm-up.
    """
    return StageConfig(
        name="vision_stage1",
        num_steps=num_steps,
        trains=SEEING,
        data=data,
        optimizer=OptimizerConfig(
            peak_lr=peak_lr,
            final_lr=peak_lr / 10,
            warmup_steps=max(num_steps // 100, 1),
            schedule="cosine",
            weight_decay=0.01,
        ),
    )


def vision_stage2_anneal(
    data: DataConfig, *, num_steps: int, image_size: int = 560, peak_lr: float = 2e-5
) -> StageConfig:
    """Better data at a higher resolution, annealed.

    Published: the resolution rises, a fresh warm-up to 2e-5. Ours: the rate then falls to zero in a
    line and checkpoints are averaged, as the paper anneals text (the paper's vision stage 2 has a
    cosine).
    """
    return StageConfig(
        name="vision_stage2_anneal",
        num_steps=num_steps,
        trains=SEEING,
        data=data,
        optimizer=OptimizerConfig(
            peak_lr=peak_lr,
            final_lr=0.0,
            warmup_steps=max(num_steps // 50, 1),
            schedule="linear",
            weight_decay=0.01,
        ),
        image_size=image_size,
        average="polyak",
        average_every=max(num_steps // 50, 1),
    )


def text_pretrain(
    data: DataConfig, *, num_steps: int, peak_lr: float, warmup_steps: int = 8000
) -> StageConfig:
    """Published: AdamW, the warm-up, the cosine to a hundredth of the peak (405B); decay 0.1."""
    return StageConfig(
        name="text_pretrain",
        num_steps=num_steps,
        trains=("language_model",),
        data=data,
        optimizer=OptimizerConfig(
            peak_lr=peak_lr,
            final_lr=peak_lr / 100,
            warmup_steps=warmup_steps,
            schedule="cosine",
            weight_decay=0.1,
        ),
    )


def long_context(
    data: DataConfig,
    *,
    num_steps: int,
    learning_rate: float,
    lengths: Sequence[int] = LONG_LENGTHS,
) -> tuple[StageConfig, ...]:
    """Rows grow from stage to stage at the rate where pretraining ended; a step has as many tokens.

    Published: six stages, 800B tokens together; one goes on when short-context results are back and
    a needle is found at its length. `num_steps` are those of each.
    """
    tokens = data.length * data.batch_size
    return tuple(
        StageConfig(
            name=f"long_context_{length}",
            num_steps=num_steps,
            trains=("language_model",),
            data=replace(data, length=length, batch_size=max(tokens // length, 1)),
            optimizer=OptimizerConfig(
                peak_lr=learning_rate,
                final_lr=learning_rate,
                schedule="constant",
                weight_decay=0.1,
            ),
        )
        for length in lengths
    )


def text_anneal(data: DataConfig, *, num_steps: int, peak_lr: float) -> StageConfig:
    """Published: a line to zero over the last 40M tokens at full length; checkpoints averaged."""
    return StageConfig(
        name="text_anneal",
        num_steps=num_steps,
        trains=("language_model",),
        data=data,
        optimizer=OptimizerConfig(
            peak_lr=peak_lr, final_lr=0.0, schedule="linear", weight_decay=0.1
        ),
        average="polyak",
        average_from=0.0,
        average_every=1,
    )


def vision_pretrain(model: LlamaConfig, *, start_from: str, directory: str) -> TrainConfig:
    """Both vision stages at full size, on folders below data/ that `l32jax data prepare` made.

    Published: 6 billion pairs, then 500 million better images, 350 of them resampled pairs and 150
    from five sources; 16,384 images a step, where rows are full. Ours: the shapes of rows.
    """
    pairs = DataConfig(
        mixture=(("data/pairs", 1.0),),
        batch_size=512,
        length=2048,
        max_images=32,
        vision_tiles=96,
        packing_rows=64,
        workers=8,
    )
    better = DataConfig(
        mixture=(
            ("data/pairs_resampled", 0.70),
            ("data/grounding", 0.06),
            ("data/screenshots", 0.06),
            ("data/questions", 0.06),
            ("data/synthetic_captions", 0.06),
            ("data/synthetic_structure", 0.06),
        ),
        batch_size=512,
        length=4096,
        max_images=32,
        vision_tiles=96,
        packing_rows=64,
        workers=8,
    )
    return TrainConfig(
        model=model,
        stages=(
            vision_stage1(pairs, num_steps=366_000),
            vision_stage2_anneal(better, num_steps=30_500),
        ),
        directory=directory,
        start_from=start_from,
        dtype="bfloat16",
        params="bfloat16",
        saved="attention",
        save_every=1000,
    )


def text_run(model: LlamaConfig, *, peak_lr: float, directory: str, tokenizer: str) -> TrainConfig:
    """Pretraining, six long-context stages, annealing, on folders that `l32jax data prepare` made.

    Published: the shares of the data, 16M tokens a step, where the paper ends; its smaller steps at
    the beginning are left out.
    """
    data = DataConfig(
        mixture=TEXT_SHARES,
        batch_size=2048,
        length=8192,
        workers=8,
    )
    long = replace(data, mixture=(*data.mixture, ("data/long_documents", 0.25)))
    last = replace(long, length=LONG_LENGTHS[-1], batch_size=16)  # 2M tokens a step
    annealing = replace(last, mixture=(*long.mixture, ("data/high_quality", 0.5)))
    return TrainConfig(
        model=model,
        stages=(
            text_pretrain(data, num_steps=900_000, peak_lr=peak_lr),
            *long_context(long, num_steps=8_000, learning_rate=peak_lr / 100),
            text_anneal(annealing, num_steps=20, peak_lr=peak_lr / 100),
        ),
        directory=directory,
        tokenizer=tokenizer,
        dtype="bfloat16",
        params="bfloat16",
        saved="attention",
        save_every=1000,
    )
