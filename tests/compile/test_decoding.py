"""What a token costs on a TPU beside the weights: caches are written and read where they lie."""

import re
from dataclasses import replace

import pytest

from l32jax.config import MeshConfig
from l32jax.plan.serving import Requests, compile_serving
from l32jax.plan.topology import open_topology
from l32jax.presets import LLAMA3_1_8B, LLAMA3_2_1B
from l32jax.sharding import make_mesh

pytest.importorskip("libtpu")
pytestmark = pytest.mark.compile


@pytest.mark.parametrize("model", [LLAMA3_2_1B, LLAMA3_1_8B], ids=["heads of 64", "heads of 128"])
@pytest.mark.parametrize("tensor", [1, 4])
def test_no_layer_copies_the_caches(model, tensor):
    small = replace(model, decoder=replace(model.decoder, num_groups=2, vocab_size=1024))
    topology = open_topology("v5e:2x2")
    mesh = make_mesh(MeshConfig(fsdp=-1, tensor=tensor), topology.devices)
    text = compile_serving(small, Requests(rows=8, length=1024), "decode", mesh).text
    rows, heads = 8 * tensor // 4, small.decoder.num_kv_heads // tensor
    cache = rf"bf16\[2,{rows},{heads},1536,{small.decoder.head_dim}\]"
    bodies = [part for part in re.split(r"\n(?=%|ENTRY)", text) if not part.startswith("ENTRY")]
    assert any(re.search(cache, body) for body in bodies)
    copies = [
        line
        for body in bodies
        for line in body.splitlines()
        if re.search(rf" = {cache}\S* copy\(", line)
    ]
    assert not copies, copies[0][:200]
