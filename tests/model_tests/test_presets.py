"""The members of the family have the sizes that were published, and fall into their parts."""

import dataclasses

import jax
import pytest

from l32jax.config import VisionConfig
from l32jax.errors import InputError
from l32jax.model.llama import abstract_params
from l32jax.model.parameters import combine, count, flatten, part_of, partition, trains
from l32jax.presets import (
    LLAMA3_2_11B_VISION,
    LLAMA3_2_90B_VISION,
    PRESETS,
    SMOLLM2_135M,
    TINY_TEXT,
    TINY_VISION,
    preset,
    with_vision,
)
from l32jax.sharding import single_device_mesh

# Text: Meta's and Hugging Face's counts. Vision: Meta's, whose tile tables are 4 x 4 grids.
COUNTS = {
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-11b-vision": 10_616_650_275,
    "llama3.2-11b-vision-instruct": 10_629_184_035,
    "llama3.2-90b-vision": 88_552_318_523,
    "smollm2-135m": 134_515_008,
}


def shapes_of(config):
    with jax.set_mesh(single_device_mesh()):
        return abstract_params(config)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    assert count(shapes_of(preset(name))) == COUNTS[name]


def test_parts_have_the_published_sizes():
    sizes = {"language_model": 0, "vision_tower": 0, "adapter": 0}
    for path, leaf in flatten(shapes_of(LLAMA3_2_11B_VISION)).items():
        sizes[part_of(path, LLAMA3_2_11B_VISION)] += count(leaf)
    assert sizes["language_model"] == COUNTS["llama3.1-8b"]
    cross_layers, projector, image_embedding = 8 * 218_112_258, 31_461_376, 8 * 4096
    assert sizes["adapter"] == cross_layers + projector + image_embedding


def test_cross_attention_stands_where_the_released_models_have_it():
    for config, expected in (
        (LLAMA3_2_11B_VISION, [3, 8, 13, 18, 23, 28, 33, 38]),
        (LLAMA3_2_90B_VISION, list(range(3, 100, 5))),
    ):
        kinds = config.decoder.group_pattern * config.decoder.num_groups
        assert [layer for layer, kind in enumerate(kinds) if kind == "cross"] == expected


def test_each_part_is_the_rest_of_the_others():
    params = shapes_of(TINY_VISION)
    whole = {path: leaf.shape for path, leaf in flatten(params).items()}
    for chosen in (("adapter",), ("vision_tower", "adapter"), ("language_model",), ()):
        trainable, frozen = partition(params, trains(chosen, TINY_VISION))
        assert not flatten(trainable).keys() & flatten(frozen).keys()
        assert {part_of(path, TINY_VISION) for path in flatten(trainable)} == set(chosen)
        again = {path: leaf.shape for path, leaf in flatten(combine(trainable, frozen)).items()}
        assert again == whole


def test_the_trunk_of_a_vision_model_has_the_layers_of_the_text_model():
    vision = with_vision(TINY_TEXT, VisionConfig(image_size=28))
    assert vision.decoder.count("self") == TINY_TEXT.decoder.num_groups
    assert vision.decoder.group_pattern == ("self", "self", "self", "cross", "self")
    same = dataclasses.replace(vision.decoder, num_groups=4, group_pattern=("self",))
    assert same == TINY_TEXT.decoder


def test_a_trunk_can_look_every_so_many_layers():
    config = with_vision(SMOLLM2_135M, VisionConfig(image_size=28), every=6).decoder
    kinds = config.group_pattern * config.num_groups
    assert [at for at, kind in enumerate(kinds) if kind == "cross"] == [5, 12, 19, 26, 33]
    each = with_vision(TINY_TEXT, VisionConfig(image_size=28), every=1).decoder
    assert (each.group_pattern, each.num_groups) == (("cross", "self"), 4)


def test_a_trunk_that_cannot_be_looked_from_is_refused():
    encoder = VisionConfig(image_size=28)
    with pytest.raises(InputError, match="trunk of 30 layers: groups of 4 .* divisor"):
        with_vision(SMOLLM2_135M, encoder)
    with pytest.raises(InputError, match="trunk of 30 layers: groups of 0 "):
        with_vision(SMOLLM2_135M, encoder, every=0)
    with pytest.raises(InputError, match="give a text model's"):
        with_vision(TINY_VISION, encoder)


def test_an_unknown_preset_is_named_beside_the_closest():
    with pytest.raises(InputError, match="'llama3.2-1B'; did you mean 'llama3.2-1b'?"):
        preset("llama3.2-1B")
    assert all(preset(name) is config for name, config in PRESETS.items())
