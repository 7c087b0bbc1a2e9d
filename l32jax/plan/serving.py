"""Reading prompts and writing answers, on a machine that is not here."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l32jax.config import LlamaConfig, SamplingConfig
from l32jax.data.rows import FIELDS, VisionShape, make_prompt_batch
from l32jax.errors import InputError
from l32jax.generate.decode import Draw, bucket, decode, prefill
from l32jax.model.attention import Interval
from l32jax.model.llama import abstract_params
from l32jax.model.parameters import on_mesh
from l32jax.plan.program import Compiled, Memory, compile_for, device_bytes
from l32jax.plan.workload import visible
from l32jax.run_config import DataConfig
from l32jax.sharding import CONTEXT_AXIS, activation_spec, row_parts
from l32jax.train.flops import Counts

Phase = Literal["prefill", "decode"]
DTYPE = jnp.bfloat16  # of weights, activations and caches


class Requests(NamedTuple):
    """rows at once, each with so many tokens (of a prompt, or in its cache) and images."""

    rows: int
    length: int
    images: int = 0

    def counts(self, phase: Phase, model: LlamaConfig) -> Counts:
        """What a step works on: whole prompts, or the next token of each row."""
        tokens = self.rows * (self.length if phase == "prefill" else 1)
        seen = (self.length + 1) // 2 if phase == "prefill" else self.length
        counts = Counts(tokens=tokens, slots=tokens, pairs=tokens * seen)
        if model.vision is None or not self.images:
            return counts
        per_image = model.vision.max_tiles * model.vision.tokens_per_tile
        counts += Counts(looking=tokens, vision_pairs=tokens * per_image)
        if phase == "decode":
            return counts
        images = self.rows * self.images
        tiles = images * model.vision.max_tiles
        return counts + Counts(images=images, image_slots=images, tiles=tiles, tile_slots=tiles)

    def visible(self, model: LlamaConfig) -> dict[tuple[int, int], float]:
        """As `workload.visible`."""
        if model.vision is None or not self.images:
            return {}
        data = DataConfig(
            mixture=(("none", 1.0),),
            batch_size=self.rows,
            length=self.length,
            max_images=self.images,
            max_tiles=model.vision.max_tiles,
        )
        return visible(data, model, context=1)


def compile_serving(model: LlamaConfig, requests: Requests, phase: Phase, mesh: Mesh) -> Compiled:
    """The program that reads prompts of full length, or that writes the next tokens after them."""
    _require_even(requests, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        params = on_mesh(abstract_params(model, DTYPE), mesh)
        draw = on_mesh(jax.eval_shape(lambda: Draw.of(SamplingConfig())), mesh)
        prompt = _prompt(model, requests, mesh)
        reading = (params, prompt, *_rows_of(requests, mesh), draw)
        static = {"cache_length": bucket(requests.length + 1), "greedy": True}
        read = partial(prefill, model, **static)
        progress = on_mesh(jax.eval_shape(read, *reading), mesh)
    sizes = Memory(device_bytes(params), 0, device_bytes(progress), 0, True)
    if phase == "prefill":
        return compile_for(mesh, prefill, (model, *reading), sizes, **static)
    one = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    stops = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=one.sharding)
    seen = _next_seen(requests, mesh) if requests.images else None
    writing = (model, params, progress, seen, stops, one, draw)
    return compile_for(mesh, decode, writing, sizes, greedy=True)


def _require_even(requests: Requests, mesh: Mesh) -> None:
    shares = row_parts(mesh.shape)
    if mesh.shape[CONTEXT_AXIS] > 1:
        raise InputError("mesh with a context axis: generation does not split rows; let it be 1")
    if requests.rows % shares:
        raise InputError(
            f"{requests.rows} rows to serve: {shares} devices along data and fsdp share them; give "
            "a multiple, or more devices along tensor"
        )


def _prompt(model: LlamaConfig, requests: Requests, mesh: Mesh) -> Mapping[str, Any]:
    """A batch of prompts as `generate` places it, as shapes."""
    vision = None
    if requests.images:
        tiles = 4 if model.vision is None else model.vision.max_tiles
        vision = VisionShape.of(model, max_images=requests.images, max_tiles=tiles)
    row = make_prompt_batch([([1], [])], length=requests.length, vision=vision)
    left_out = ("length", "next_vision_start", "next_vision_stop")
    return {
        name: jax.ShapeDtypeStruct(
            (requests.rows, *array.shape[1:]),
            array.dtype,
            sharding=NamedSharding(mesh, activation_spec(FIELDS[name])),
        )
        for name, array in row.items()
        if name not in left_out
    }


def _rows_of(requests: Requests, mesh: Mesh) -> tuple[Any, Any]:
    """The lengths of the prompts, and a key for each."""
    rows = NamedSharding(mesh, activation_spec("b"))
    shapes = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), requests.rows))
    keys = jax.ShapeDtypeStruct(shapes.shape, shapes.dtype, sharding=rows)
    return jax.ShapeDtypeStruct((requests.rows,), jnp.int32, sharding=rows), keys


def _next_seen(requests: Requests, mesh: Mesh) -> Interval:
    where = NamedSharding(mesh, activation_spec("bt"))
    bound = jax.ShapeDtypeStruct((requests.rows, 1), jnp.int32, sharding=where)
    both: Any = (bound, bound)
    return Interval(*both)
