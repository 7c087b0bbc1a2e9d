"""The two stages of configs/vision_11b.py in miniature, on generated charts and documents.

    l32jax train configs/vision_twin.py

On two CPU cores: about half an hour. A language model of this world comes first, as there is none
to start from; then stage 1 on captions at tiles of 32 pixels against it, frozen, and stage 2 on
questions and captions at tiles of 48, annealed and averaged. Rates are those of small models. It
shows the mechanics of the chain (packed rows, a change of resolution, an average, resuming); how
much is learned from charts in this time has not been measured yet.
"""

from dataclasses import replace

from l32jax.config import DecoderConfig, LlamaConfig, VisionConfig
from l32jax.recipes import text_pretrain, vision_stage1, vision_stage2_anneal
from l32jax.run_config import DataConfig, StageConfig, TrainConfig

MODEL = LlamaConfig(
    decoder=DecoderConfig(
        vocab_size=512,  # bytes: no tokenizer to look for
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=160,
        num_groups=2,
        group_pattern=("self", "cross", "self"),
        rope_theta=1000.0,
        max_context=1024,
    ),
    vision=VisionConfig(
        image_size=32,
        patch_size=8,
        embed_dim=64,
        num_heads=2,
        mlp_dim=192,
        num_local_layers=2,
        num_global_layers=1,
        taps=(1,),
    ),
)


def config() -> TrainConfig:
    text = DataConfig(
        mixture=(("charts/train/reasoned", 0.9), ("charts/train/captions", 0.1)),
        batch_size=8,
        length=512,
    )
    pairs = DataConfig(
        mixture=(("charts/train/captions", 1.0),),
        batch_size=4,
        length=512,
        max_images=8,
        packing_rows=8,
    )
    better = replace(
        pairs, mixture=(("charts/train/reasoned", 0.5), ("charts/train/captions", 0.5))
    )
    return TrainConfig(
        model=MODEL,
        stages=(
            text_pretrain(text, num_steps=800, peak_lr=4e-3, warmup_steps=50),
            small(vision_stage1(pairs, num_steps=1500, peak_lr=4e-3)),
            small(vision_stage2_anneal(better, num_steps=400, image_size=48, peak_lr=1e-3)),
        ),
        directory="runs/vision_twin",
        save_every=200,
    )


def small(stage: StageConfig) -> StageConfig:
    """In so few steps gates stay nearly shut at the rate of the matrices."""
    return replace(stage, optimizer=replace(stage.optimizer, gate_rate=30.0))
