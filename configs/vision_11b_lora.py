"""LoRA of Llama 3.2 11B Vision Instruct on conversations about pictures; QLoRA with params=int4.

    l32jax train configs/vision_11b_lora.py start_from=PATH/Llama-3.2-11B-Vision-Instruct
    l32jax convert runs/vision_11b_lora my-lora --to peft

Data: conversations in JSON lines, see docs/data.md. The rate is that of QLoRA's authors for models
of this size (Dettmers et al., 2023, table 9). Hardware: a pod of eight v5e, by `l32jax plan` (9.8
of 16 GiB each, 6.8 with int4; docs/adapters.md); nothing of this size was run here.
"""

from dataclasses import replace

from l32jax.config import LoraConfig
from l32jax.presets import LLAMA3_2_11B_VISION_INSTRUCT
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig


def config() -> TrainConfig:
    base = LLAMA3_2_11B_VISION_INSTRUCT
    data = DataConfig(
        mixture=(("data/conversations.jsonl", 1.0),),
        batch_size=16,
        length=2048,
        max_images=2,
        vision_tiles=8,
        workers=2,
    )
    stage = StageConfig(
        name="adapting",
        num_steps=1000,
        trains=("lora",),
        data=data,
        optimizer=OptimizerConfig(peak_lr=2e-4, warmup_steps=30, weight_decay=0.0),
    )
    return TrainConfig(
        model=replace(base, decoder=replace(base.decoder, lora=LoraConfig(rank=16, alpha=32.0))),
        stages=(stage,),
        directory="runs/vision_11b_lora",
        start_from="checkpoints/Llama-3.2-11B-Vision-Instruct",
        dtype="bfloat16",
        params="bfloat16",
        saved="attention",
        save_every=100,
    )
