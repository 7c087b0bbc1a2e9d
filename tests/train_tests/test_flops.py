"""What is counted is what XLA counts, and what the rule of thumb says."""

import dataclasses

import jax
import numpy as np
import pytest

from l32jax.config import DecoderConfig, LlamaConfig, LoraConfig, Part, VisionConfig
from l32jax.model import llama
from l32jax.model.parameters import combine, count, partition, trains
from l32jax.presets import LLAMA3_2_1B, LLAMA3_2_11B_VISION
from l32jax.sharding import single_device_mesh
from l32jax.train.flops import Counts, Flops, lora_weights, peak, step_flops

# Every scan has one turn, as XLA counts the body of a loop once; wide, as it also counts what is
# done element by element.
DECODER = DecoderConfig(
    vocab_size=1024,
    embed_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=768,
    num_groups=1,
)
TEXT = LlamaConfig(decoder=DECODER)
VISION = LlamaConfig(
    decoder=dataclasses.replace(DECODER, group_pattern=("self", "cross")),
    vision=VisionConfig(
        image_size=56,
        patch_size=14,
        embed_dim=256,
        num_heads=4,
        mlp_dim=512,
        num_local_layers=1,
        num_global_layers=1,
        taps=(0,),
        max_tiles=4,
    ),
)
LORA = LoraConfig(rank=8)
TEXT_LORA = LlamaConfig(decoder=dataclasses.replace(DECODER, lora=LORA))
VISION_LORA = dataclasses.replace(VISION, decoder=dataclasses.replace(VISION.decoder, lora=LORA))
ROWS, LENGTH = 2, 128


def full_batch(model: LlamaConfig) -> dict[str, np.ndarray]:
    """No padding, and everything sees everything, as dense attention computes it."""
    shape = (ROWS, LENGTH)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "start")}
    batch["stop"] = np.full(shape, LENGTH, np.int32)
    if model.vision is not None:
        size, tiles = model.vision.image_size, model.vision.max_tiles
        batch |= {
            "tiles": np.zeros((ROWS, 1, tiles, 3, size, size), np.float32),
            "aspect": np.full((ROWS, 1, 2), 2, np.int32),
            "tile_index": np.tile(np.arange(tiles, dtype=np.int32), (ROWS, 1)),
            "vision_start": np.zeros(shape, np.int32),
            "vision_stop": np.full(shape, tiles * model.vision.tokens_per_tile, np.int32),
        }
    return batch


def counted_by_xla(model: LlamaConfig, parts: tuple[Part, ...]) -> float:
    def gradient(params, batch):
        trainable, frozen = partition(params, trains(parts, model))

        def loss(trainable):
            bound = llama.bind(model, combine(trainable, frozen))
            logits = bound.decoder.logits(llama.forward_batch(bound, batch).states)
            return (logits**2).sum()

        return jax.grad(loss)(trainable)

    with jax.set_mesh(single_device_mesh()):
        params = llama.abstract_params(model)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), full_batch(model))
        return jax.jit(gradient).lower(params, batch).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (TEXT, ("language_model",)),
        (VISION, ("language_model", "vision_tower", "adapter")),
        (VISION, ("vision_tower", "adapter")),
        (VISION, ("adapter",)),
        (TEXT_LORA, ("language_model", "lora")),
        (VISION_LORA, ("lora",)),
        (VISION_LORA, ("vision_tower", "adapter")),
    ],
    ids=["text", "all", "stage", "adapter", "lora", "vision lora", "frozen lora"],
)
def test_a_step_without_padding_costs_what_xla_counts(model, parts):
    counts = Counts.of(full_batch(model))
    ours = sum((flops for flops in step_flops(model, parts, counts).values()), Flops(0, 0))
    xla = counted_by_xla(model, parts)
    print(
        f"\n{parts}: ours {ours.done / 1e6:.1f}, XLA {xla / 1e6:.1f} MFLOP: {ours.done / xla:.3f}"
    )
    assert ours.done == pytest.approx(xla, rel=0.03)


def test_text_follows_the_rule_of_six():
    """Six a parameter and token, and twelve a layer, head dimension and pair."""
    counts = Counts(tokens=1000, slots=1250, pairs=300_000)
    found = step_flops(LLAMA3_2_1B, ("language_model",), counts)["language_model"]
    decoder = LLAMA3_2_1B.decoder
    with jax.set_mesh(single_device_mesh()):
        parameters = count(llama.abstract_params(LLAMA3_2_1B))
    norms = (2 * decoder.num_layers + 1) * decoder.embed_dim
    attention = 12 * decoder.num_layers * decoder.num_heads * decoder.head_dim * counts.pairs
    assert found.useful == 6 * (parameters - norms) * counts.tokens + attention
    assert found.done == 6 * (parameters - norms) * counts.slots + attention


def test_what_is_frozen_costs_less():
    counts = Counts.of(full_batch(LLAMA3_2_11B_VISION_SHAPES))
    model = LLAMA3_2_11B_VISION_SHAPES
    everything = step_flops(model, ("language_model", "vision_tower", "adapter"), counts)
    frozen = step_flops(model, ("vision_tower", "adapter"), counts)
    tower_too = step_flops(model, ("adapter",), counts)
    text = dataclasses.replace(counts, pairs=0)  # of attention nothing is weights
    trunks = [
        step_flops(model, (part,), text)["language_model"] for part in ("adapter", "language_model")
    ]
    assert 3 * trunks[0].useful == 2 * trunks[1].useful
    assert frozen["vision_tower"] == everything["vision_tower"]
    assert tower_too["vision_tower"].useful < frozen["vision_tower"].useful / 2.9


LLAMA3_2_11B_VISION_SHAPES = dataclasses.replace(
    LLAMA3_2_11B_VISION,
    vision=dataclasses.replace(LLAMA3_2_11B_VISION.vision, image_size=56),
)


def test_adapters_are_counted_as_many_as_there_are():
    vision = dataclasses.replace(VISION_LORA.vision, lora=LORA)
    model = dataclasses.replace(VISION_LORA, vision=vision)
    with jax.set_mesh(single_device_mesh()):
        lora, _ = partition(llama.abstract_params(model), trains(("lora",), model))
    assert sum(lora_weights(model).values()) == count(lora)


def test_padding_is_done_but_of_no_use():
    batch = full_batch(VISION)
    whole = Counts.of(batch)
    batch["stop"][1] = batch["vision_stop"][1] = 0
    batch["aspect"][1] = 0
    half = Counts.of(batch)
    assert half.padding() == {"text": 0.5, "images": 0.5, "tiles": 0.5}
    parts = ("language_model", "vision_tower", "adapter")
    before, after = (step_flops(VISION, parts, counts) for counts in (whole, half))
    for part in parts:
        assert after[part].useful == before[part].useful / 2
    assert after["vision_tower"].done == before["vision_tower"].done
    assert 0.5 * before["adapter"].done < after["adapter"].done < before["adapter"].done
    assert whole + half == Counts.of(
        {
            n: np.concatenate([a, b])
            for (n, a), b in zip(full_batch(VISION).items(), batch.values(), strict=True)
        }
    )


def test_other_processes_have_as_much():
    assert Counts.of(full_batch(VISION), shares=3).tokens == 3 * ROWS * LENGTH


def test_text_rows_of_a_vision_model_cost_no_vision():
    found = step_flops(VISION, ("language_model",), Counts.of(full_batch(TEXT)))
    assert found["adapter"] == found["vision_tower"] == Flops(0, 0)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_peaks_of_device_kinds(kind, tera):
    assert peak(kind) == tera * 1e12


def test_the_peak_of_a_cpu_is_not_known():
    assert peak(jax.devices("cpu")[0].device_kind) is None
