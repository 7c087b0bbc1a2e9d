"""Of a base in int4, only integers travel, and only those of a layer are ever dequantised."""

import dataclasses
import math
import re

import pytest

from l32jax.config import LlamaConfig, LoraConfig, MeshConfig
from l32jax.plan.program import Compiled, compile_training
from l32jax.plan.topology import open_topology
from l32jax.presets import TINY_TEXT
from l32jax.run_config import TrainConfig
from l32jax.sharding import make_mesh
from tests.train_tests.small import stage

pytest.importorskip("libtpu")
pytestmark = pytest.mark.compile

WIDTH, MLP = 1024, 4096
DEVICES = 4


def compiled(num_groups: int, saved: str) -> Compiled:
    decoder = dataclasses.replace(
        TINY_TEXT.decoder,
        num_groups=num_groups,
        embed_dim=WIDTH,
        mlp_dim=MLP,
        head_dim=128,
        num_heads=8,
        num_kv_heads=4,
        lora=LoraConfig(rank=4),
    )
    adapters = stage(("lora",))
    data = dataclasses.replace(adapters.data, batch_size=DEVICES, length=256)
    config = TrainConfig(
        model=LlamaConfig(decoder=decoder),
        stages=(dataclasses.replace(adapters, data=data),),
        directory="runs/none",
        params="int4",
        dtype="bfloat16",
        saved=saved,
    )
    machine = open_topology("v5e:2x2", 1)
    return compile_training(config, 0, make_mesh(MeshConfig(fsdp=DEVICES), machine.devices))


@pytest.mark.parametrize("saved", ["everything", "attention"])
def test_more_layers_hold_no_more_than_their_integers(saved):
    few, many = (compiled(num_groups, saved) for num_groups in (2, 6))
    numbers = WIDTH * (2 * WIDTH + 2 * WIDTH // 2 + 3 * MLP)
    work = (many.memory.work - few.memory.work) / 4
    assert work < 1.25 * numbers / DEVICES  # of bfloat16 there would be twice as many bytes
    params = (many.memory.params - few.memory.params) / 4
    assert 0.56 < params * DEVICES / numbers < 0.65  # float32 adapters among them


def test_devices_give_each_other_integers():
    text = compiled(2, "attention").text
    largest: dict[str, int] = {}
    for dtype, shape in re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text):
        size = math.prod(map(int, shape.split(",")))
        largest[dtype] = max(size, largest.get(dtype, 0))
    integers = largest.pop("s4")
    assert integers >= WIDTH * WIDTH // 2  # of keys and values
    assert all(size < integers / 2 for size in largest.values())
