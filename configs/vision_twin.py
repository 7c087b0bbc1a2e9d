"""The two stages of configs/vision_11b.py in miniature, on generated charts and documents.

    l32jax train configs/vision_twin.py

On two CPU cores: about half an hour. A language model of this world comes first, as there is none
to start from; then stage 1 on captions at tiles of 32 pixels against it, frozen, and stage 2 on
questions at tiles of 48, annealed and averaged. Rates are those of small models.
`python -m benchmarks.two_stages` runs it too and asks it questions: docs/two_stages.md.

Its tokenizer stands beside it; `python configs/vision_twin.py` makes that again.
"""

import itertools
from dataclasses import replace
from pathlib import Path

from l32jax.config import DecoderConfig, LlamaConfig, VisionConfig
from l32jax.data.charts.baselines import asked
from l32jax.data.charts.questions import reply
from l32jax.data.charts.scenes import Charts, description
from l32jax.data.tokenizer import Tokenizer
from l32jax.recipes import text_pretrain, vision_stage1, vision_stage2_anneal
from l32jax.run_config import DataConfig, StageConfig, TrainConfig

MODEL = LlamaConfig(
    decoder=DecoderConfig(
        vocab_size=691,
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
        patch_size=16,
        embed_dim=128,
        num_heads=4,
        mlp_dim=384,
        num_local_layers=2,
        num_global_layers=1,
        taps=(1,),
    ),
)
TOKENIZER = Path(__file__).with_name("vision_twin.tokenizer.model")
PEAK_LR = 2e-3


def config() -> TrainConfig:
    text = DataConfig(
        mixture=(("charts/train/reasoned", 0.9), ("charts/train/captions", 0.1)),
        batch_size=24,
        length=128,
    )
    pairs = DataConfig(
        mixture=(("charts/train/captions", 1.0),), batch_size=8, length=64, max_images=4
    )
    better = replace(
        pairs,
        mixture=(("charts/train/reasoned", 0.9), ("charts/train/captions", 0.1)),
        batch_size=16,
        length=128,
        max_images=2,
    )
    return TrainConfig(
        model=MODEL,
        stages=(
            with_muon(text_pretrain(text, num_steps=1500, peak_lr=5e-3, warmup_steps=50)),
            small(vision_stage1(pairs, num_steps=5000, peak_lr=PEAK_LR)),
            small(
                vision_stage2_anneal(better, num_steps=600, image_size=48, peak_lr=PEAK_LR / 3),
            ),
        ),
        directory="runs/vision_twin",
        tokenizer=str(TOKENIZER),
        save_every=500,
        log_every=100,
        show_every=500,
    )


def with_muon(stage: StageConfig) -> StageConfig:
    """After as many steps the small language model reasons better than with AdamW."""
    return replace(stage, optimizer=replace(stage.optimizer, kind="muon"))


def small(stage: StageConfig) -> StageConfig:
    """In so few steps gates stay nearly shut at the rate of the matrices."""
    optimizer = replace(stage.optimizer, gate_rate=30.0, weight_decay=0.1)
    return replace(stage, optimizer=optimizer)


def make_tokenizer() -> Tokenizer:
    """From what is shown and asked on some training pictures, and the chat format's own words."""
    scenes = Charts("train")
    shown = [description(scene) for scene in itertools.islice(scenes, 3000)]
    told = [f"{each.text} {reply('', each)}" for each in asked(scenes, 3000)]
    chat = ["user", "assistant", "\n\n"] * 2000
    return Tokenizer.train([*shown * 4, *told, *chat], num_merges=300)


if __name__ == "__main__":
    TOKENIZER.write_bytes(make_tokenizer().files()["tokenizer.model"])
