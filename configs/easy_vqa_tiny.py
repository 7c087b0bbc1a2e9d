"""The preset `tiny-vision` looks at easy-VQA: both stages, small enough to watch.

    l32jax train configs/easy_vqa_tiny.py
    l32jax train configs/easy_vqa_tiny.py directory=runs/other stages.1.num_steps=200

On two CPU cores: a few minutes. It shows the mechanics (stages, frozen parts, resuming), not the
accuracy: `l32jax quickstart` has a recipe for that. Needs the extra `quickstart` for the data.
"""

from l32jax.presets import TINY_VISION
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig


def config() -> TrainConfig:
    text = DataConfig(mixture=(("easy-vqa/train", 1.0),), batch_size=16, length=256)
    pictures = DataConfig(
        mixture=(("easy-vqa/train", 1.0),), batch_size=16, length=256, max_images=1, max_tiles=1
    )
    better = DataConfig(
        mixture=(("easy-vqa/train", 0.5), ("easy-vqa/train/captions", 0.5)),
        batch_size=16,
        length=256,
        max_images=1,
        max_tiles=4,
    )
    seeing = ("vision_tower", "adapter")
    return TrainConfig(
        model=TINY_VISION,
        directory="runs/easy_vqa_tiny",
        stages=(
            StageConfig(
                name="trunk",
                num_steps=100,
                trains=("language_model",),
                data=text,
                optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=10),
            ),
            StageConfig(
                name="stage1",
                num_steps=100,
                trains=seeing,
                data=pictures,
                optimizer=OptimizerConfig(peak_lr=2e-3, final_lr=5e-4, warmup_steps=10),
            ),
            StageConfig(
                name="stage2_anneal",
                num_steps=50,
                trains=seeing,
                data=better,
                optimizer=OptimizerConfig(peak_lr=5e-4, warmup_steps=5, schedule="linear"),
            ),
        ),
    )
