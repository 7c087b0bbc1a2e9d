"""Full rows, by arithmetic."""

from dataclasses import replace

import pytest

from l32jax.plan.workload import flops_by_part, full_rows, visible
from l32jax.presets import LLAMA3_1_8B, LLAMA3_2_11B_VISION
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig
from l32jax.train.flops import step_flops

TEXT = DataConfig(mixture=(("none", 1.0),), batch_size=128, length=8192)
IMAGES = replace(TEXT, batch_size=4, length=2048, max_images=32, vision_tiles=96)


def test_full_text_rows_are_causal_documents():
    counts = full_rows(TEXT, LLAMA3_1_8B)
    assert counts.tokens == counts.slots == 128 * 8192
    assert counts.pairs == 128 * 8192 * 8193 // 2
    assert counts.images == counts.looking == 0
    assert visible(TEXT, LLAMA3_1_8B, context=1) == {}


def test_full_rows_of_images_use_every_slot_and_see_one_image_each():
    counts = full_rows(IMAGES, LLAMA3_2_11B_VISION)
    assert (counts.images, counts.tiles) == (4 * 32, 4 * 96)
    assert counts.looking == 4 * 2048
    assert counts.vision_pairs == 4 * 2048 * 3 * 1025  # three tiles of 1,025 tokens
    assert counts.padding() == {"text": 0, "images": 0, "tiles": 0}
    seen = visible(IMAGES, LLAMA3_2_11B_VISION, context=2)
    assert seen == {(4 * 1032, 4 * 1032): 1.0, (1024, 96 * 1025): 1 / 32}


@pytest.mark.parametrize("trains", [("language_model",), ("vision_tower", "adapter")])
def test_parts_add_up_to_the_step(trains):
    stage = StageConfig(
        name="s", num_steps=1, trains=trains, data=IMAGES, optimizer=OptimizerConfig(peak_lr=1e-3)
    )
    counts = full_rows(IMAGES, LLAMA3_2_11B_VISION)
    parts = flops_by_part(stage, LLAMA3_2_11B_VISION, counts)
    whole = step_flops(LLAMA3_2_11B_VISION, trains, counts)
    assert {name: one.forward + one.backward for name, one in parts.items()} == whole
    for name, one in parts.items():
        assert one.trains == (name in trains)
        assert one.forward.useful > 0
    tower = parts["vision_tower"]
    assert (tower.backward.useful == 0) == ("vision_tower" not in trains)
    # Products of a frozen trunk: gradients pass through, and none are of its weights.
    trunk = parts["language_model"]
    assert trunk.backward.useful / trunk.forward.useful == pytest.approx(
        2 if "language_model" in trains else 1, rel=0.1
    )
