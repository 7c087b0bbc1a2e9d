"""The decoding kernel is compiled for chips that are not there, by their real compiler."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from l32jax.kernels.tpu import decode as tpu_decode

pytestmark = pytest.mark.compile

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# (b, k, g, t, s, h): a batch of the 8B model, a long text, the 1B model, image tokens and several
# queries at a time, key heads that are not shared, one head of eight on each chip, a short cache.
SHAPES = {
    "8b": (8, 8, 4, 1, 8192, 128),
    "long": (1, 8, 4, 1, 131072, 128),
    "1b": (8, 8, 4, 1, 8192, 64),
    "images": (2, 8, 4, 8, 6408, 128),
    "unshared": (2, 16, 1, 1, 1601, 80),
    "tensor": (8, 1, 8, 1, 8192, 128),
    "short": (3, 8, 3, 1, 100, 64),
}


def chip(name: str) -> SingleDeviceSharding:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name])
    return SingleDeviceSharding(topology.devices[0])


def arguments(where, shape, dtype=jnp.bfloat16, layers=()):
    b, k, g, t, s, h = shape
    cache, bound = ((*layers, b, k, s, h), dtype), ((b, t), jnp.int32)
    sizes = ((b, k, g, t, h), dtype), cache, cache, bound, bound
    return [jax.ShapeDtypeStruct(*size, sharding=where) for size in sizes]


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def decode(*arrays, **options):
    return tpu_decode.forward(*arrays, scale=0.1, **options)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_and_does_not_copy_the_cache(name, shape):
    b, k, _, _, s, h = SHAPES[shape]
    text = compiled(decode, *arguments(chip(name), SHAPES[shape])).as_text()
    assert text is not None and "tpu_custom_call" in text
    made = rf"= \(?\w+\[(1,)?{b},{k},({s},{h}|{h},{s})\]\S* (copy|copy-start|fusion|transpose)\("
    assert not re.search(made, text)


def test_compiles_in_float32():
    compiled(decode, *arguments(chip("v5e"), (2, 8, 3, 2, 1601, 128), jnp.float32))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_layers_in_a_scan_write_and_read_their_caches_in_place(head_dim):
    where, shape, num_layers = chip("v5p"), (4, 8, 4, 1, 8192, head_dim), 4
    q, k, v, start, stop = arguments(where, shape, layers=(num_layers,))
    batch, block = shape[0], tpu_decode.block_size(8, 8192, head_dim, 2)

    def write(cache, layer, stop, new):
        for row in range(batch):  # a scatter would have the cache laid out in its own way
            place = layer, row, 0, stop[row, 0], 0
            cache = jax.lax.dynamic_update_slice(cache, new[row][None, None], place)
        return cache

    def token(q, k, v, start, stop):
        walk = tpu_decode.plan(start, stop, block=block, num_keys=8192)

        def one_layer(carry, layer):
            q, *cache = carry
            cache = [write(each, layer, stop, q[:, :, 0]) for each in cache]
            out, _ = decode(q, *cache, start, stop, layer=layer, walk=walk, block=block)
            return (q + out, *cache), None

        return jax.lax.scan(one_layer, (q, k, v), jnp.arange(num_layers))[0]

    program = compiled(token, q, k, v, start, stop, donate_argnums=(1, 2))
    memory = program.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2**22
