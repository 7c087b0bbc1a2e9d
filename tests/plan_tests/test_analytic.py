"""The arithmetic agrees with programs that were compiled once, and with common sense."""

from dataclasses import replace
from math import prod
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.config import LlamaConfig
from l32jax.plan.analytic import Estimate, estimate
from l32jax.plan.chips import CHIPS, GIB, chip_of
from l32jax.presets import LLAMA3_1_8B, LLAMA3_1_70B, LLAMA3_2_1B, LLAMA3_2_90B_VISION
from l32jax.recipes import text_pretrain, vision_pretrain
from l32jax.run_config import DataConfig, TrainConfig

POLICIES = ("everything", "dots", "attention", "nothing")


def text(model: LlamaConfig = LLAMA3_1_8B, rows: int = 128, **changes) -> TrainConfig:
    data = DataConfig(mixture=(("data/one", 1.0),), batch_size=rows, length=8192)
    stage = text_pretrain(data, num_steps=10, peak_lr=1e-4)
    dtypes = {"dtype": "bfloat16", "params": "bfloat16"}
    options = {"model": model, "stages": (stage,), "directory": "", "saved": "attention"}
    return TrainConfig(**(options | dtypes | changes))


def vision(accumulate: int = 2) -> TrainConfig:
    config = vision_pretrain(LLAMA3_2_90B_VISION, start_from="", directory="")
    first, *_ = config.stages
    return replace(config, stages=(replace(first, accumulate=accumulate),))


def of(config: TrainConfig, chip: str, *, shape=(), slices: int = 1, **mesh: int) -> Estimate:
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | mesh
    return estimate(config, 0, chip_of(chip), sizes, slices, shape=shape)


class Compiled(NamedTuple):
    """Seconds of products, the rest, kernels and waiting; the peak in GiB.

    From `l32jax plan CONFIG --topology v5p:SHAPE --json FILE`, jax 0.10.2 with its libtpu. The
    kernels of the 90B model are timed for the keys that are really there, without their padding.
    """

    config: TrainConfig
    shape: tuple[int, ...]
    parts: tuple[float, float, float, float]
    peak: float


COMPILED = {
    "8b": Compiled(text(saved="dots"), (4, 4, 4), (2.28, 0.43, 0.33, 0.17), 52.9),
    "70b": Compiled(text(LLAMA3_1_70B, 256), (4, 4, 8), (22.26, 1.24, 1.67, 1.03), 59.5),
    "90b": Compiled(vision(), (4, 8, 8), (17.0, 5.99, 8.65, 2.06), 78.5),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_programs_take_as_long_and_as_much(name):
    one = COMPILED[name]
    found = of(one.config, "v5p", shape=one.shape, fsdp=prod(one.shape))
    assert found.time.seconds == pytest.approx(sum(one.parts), rel=0.1)
    assert found.memory.peak == pytest.approx(one.peak * GIB, rel=0.1)
    assert found.memory.fits
    assert found.time.matmul == pytest.approx(one.parts[0], rel=0.1)
    assert found.time.other == pytest.approx(one.parts[1], rel=0.2)
    assert found.time.kernels == pytest.approx(one.parts[2], rel=0.1)


FEW = settings(max_examples=12)


@FEW
@given(
    chip=st.sampled_from(sorted(CHIPS)),
    saved=st.sampled_from(POLICIES),
    axis=st.sampled_from(["data", "fsdp", "tensor"]),
)
def test_more_devices_compute_a_batch_sooner(chip, saved, axis):
    few, many = (of(text(saved=saved), chip, **{axis: size}).time for size in (4, 8))
    assert many.seconds - many.exposed < few.seconds - few.exposed
    assert sum(few.sent_along.values()) > 0


@FEW
@given(chip=st.sampled_from(sorted(CHIPS)), saved=st.sampled_from(POLICIES))
def test_parameters_that_are_shared_need_less_room(chip, saved):
    alone, shared = (of(text(saved=saved), chip, data=64 // n, fsdp=n).memory for n in (1, 64))
    assert shared.peak < alone.peak
    assert shared.params == pytest.approx(alone.params / 64, abs=1)


@FEW
@given(chip=st.sampled_from(sorted(CHIPS)))
def test_what_is_saved_costs_room_and_not_time(chip):
    found = [of(text(saved=saved), chip, fsdp=64) for saved in POLICIES]
    peaks = [one.memory.peak for one in found]
    assert peaks == sorted(peaks, reverse=True)
    products = [one.time.matmul for one in found]
    assert products == sorted(products)
    assert found[-1].time.kernels > found[-2].time.kernels


@FEW
@given(parts=st.sampled_from([1, 2, 4]))
def test_parts_of_a_batch_need_less_room_and_gather_more(parts):
    found = [of(vision(count), "v5p", fsdp=64) for count in (parts, 2 * parts)]
    assert found[1].memory.peak < found[0].memory.peak
    assert found[1].time.sent_along["fsdp",] == pytest.approx(2 * found[0].time.sent_along["fsdp",])


def test_a_device_alone_waits_for_nobody():
    found = of(text(rows=1), "v5p").time
    assert (found.exposed, found.exchanges) == (0, {})


def test_slices_send_over_the_network():
    found = of(text(), "v5e", data=4, fsdp=32, slices=4).time
    assert any(one.kind.endswith("of slices") for one in found.exchanges)


def test_gpus_hide_parameters_behind_products_and_tpus_do_not():
    gpu, tpu = (of(text(), chip, fsdp=64).time for chip in ("h100", "v5p"))
    assert gpu.exposed == 0
    assert tpu.exposed == pytest.approx(sum(one.seconds for one in tpu.exchanges.values()))
    assert of(text(), "h100", fsdp=8, tensor=8).time.exposed > 0


def test_what_waits_in_the_host_takes_time_instead_of_room():
    here, there = (of(text(offload=where), "v5p", fsdp=64) for where in ("none", "optimizer"))
    assert there.memory.optimizer == 0 < here.memory.optimizer
    assert there.time.other > here.time.other


def test_a_frozen_encoder_has_no_backward_pass():
    config = vision()
    frozen = replace(config, stages=(replace(config.stages[0], trains=("adapter",)),))
    assert of(frozen, "v5p", fsdp=256).time.kernels < 0.5 * of(config, "v5p", fsdp=256).time.kernels


def test_a_program_that_nothing_was_fitted_to_but_what_tensor_sends():
    """`l32jax plan configs/text_1b.py stages.0.data.batch_size=32 --topology v5e:4x4 --mesh
    fsdp=8,tensor=2`: 2.86 s, 7.2 GiB, 26.1 GB sent along the tensor axis.
    """
    found = of(text(LLAMA3_2_1B, 32), "v5e", shape=(4, 4), fsdp=8, tensor=2)
    assert found.time.seconds == pytest.approx(2.86, rel=0.15)
    assert found.memory.peak == pytest.approx(7.2 * GIB, rel=0.15)
    assert found.time.sent_along["tensor",] == pytest.approx(26.1e9, rel=0.05)
