"""Prefill and decoding: one jitted function each, and the loop that overlaps them with the host."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from l32jax.config import LlamaConfig, SamplingConfig
from l32jax.generate.sampling import sample
from l32jax.model.attention import Interval
from l32jax.model.cache import Cache, empty_cache
from l32jax.model.llama import Batch, bind, forward, forward_batch
from l32jax.model.parameters import Params
from l32jax.sharding import activation_spec


class Progress(NamedTuple):
    """What one step of decoding hands to the next.

    `length` counts the tokens in each row's cache, `position` is the rotary position to come.
    """

    token: Int[Array, "b"]
    length: Int[Array, "b"]
    done: Array
    keys: Key[Array, "b"]
    cache: Cache


class Draw(NamedTuple):
    """Sampling settings as arrays, so that changing one compiles nothing."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]

    @classmethod
    def of(cls, config: SamplingConfig) -> "Draw":
        reals = (config.temperature, config.top_p, config.min_p)
        temperature, top_p, min_p = map(jnp.float32, reals)
        return cls(temperature, jnp.int32(config.top_k), top_p, min_p)


@partial(jax.jit, static_argnames=("config", "cache_length", "greedy", "copies"))
def prefill(
    config: LlamaConfig,
    params: Params,
    batch: Batch,
    length: Int[Array, "b"],
    keys: Key[Array, "rows"],
    draw: Draw,
    *,
    cache_length: int,
    greedy: bool,
    copies: int = 1,
) -> Progress:
    """Reads right-padded prompts of `length` tokens into a new cache and draws the first tokens.

    Every prompt is read once and answered in `copies` rows, one below the other; `keys` has a key
    for each of these.
    """
    model = bind(config, params)
    dtype = model.decoder.embedding.weight[...].dtype
    vision_length = 0
    if "tile_index" in batch:
        assert config.vision is not None
        vision_length = batch["tile_index"].shape[1] * config.vision.tokens_per_tile
    cache = empty_cache(
        config,
        batch=length.shape[0],
        length=cache_length,
        vision_length=vision_length,
        dtype=dtype,
    )
    states, cache = forward_batch(model, batch, cache=cache, write_at=jnp.zeros_like(length))
    assert cache is not None
    states = jax.sharding.reshard(states, activation_spec("b"))
    last = jnp.take_along_axis(states, (length - 1)[:, None, None], axis=1)
    scores = repeat_rows(model.decoder.logits(last)[:, 0], copies, "b_")
    token, keys = _choose(scores, keys, draw, greedy)
    cache = jax.tree.map(lambda array: repeat_rows(array, copies, "lbksh"), cache)
    length = repeat_rows(length, copies)
    # not zeros, which would be sharded otherwise than what `decode` returns, and compile it twice
    return Progress(token, length, length < 0, keys, cache)


def repeat_rows(array: Array, copies: int, dims: str = "b") -> Array:
    """Each row, along the `b` of dims, `copies` times; rows stay on their devices."""
    if copies == 1:
        return array
    axis = dims.index("b")
    before, rows, after = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
    array = jnp.expand_dims(array, axis + 1)
    array = jnp.broadcast_to(array, (*before, rows, copies, *after))
    array = array.reshape(*before, rows * copies, *after)
    return jax.sharding.reshard(array, activation_spec(dims))  # of a single row jax forgets it


@partial(jax.jit, static_argnames=("config", "greedy"), donate_argnames="progress")
def decode(
    config: LlamaConfig,
    params: Params,
    progress: Progress,
    seen_images: Interval | None,
    stop_ids: Int[Array, "stops"],
    pad_id: Int[Array, ""],
    draw: Draw,
    *,
    greedy: bool,
) -> Progress:
    """One more token in each row that has not met a stop token; pad_id in the others."""
    model = bind(config, params)
    length = progress.length
    done = progress.done | jnp.any(progress.token[:, None] == stop_ids, axis=-1)
    states, cache = forward(
        model,
        progress.token[:, None],
        length[:, None],
        Interval(jnp.zeros_like(length)[:, None], length[:, None] + 1),
        seen_images=seen_images,
        cache=progress.cache,
        write_at=length,
    )
    assert cache is not None
    token, keys = _choose(model.decoder.logits(states)[:, 0], progress.keys, draw, greedy)
    token = jnp.where(done, pad_id, token)
    return Progress(token, length + 1, done, keys, cache)


def _choose(scores, keys, draw, greedy):
    scores = jax.sharding.reshard(scores, activation_spec("b_"))  # whole vocabulary in one place
    if greedy:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), keys
    # Unpacked in vmap: split[:, 0] would lose the sharding of a single row in jax 0.12.
    keys = jax.sharding.reshard(keys, activation_spec("b"))
    now, later = jax.vmap(lambda key: tuple(jax.random.split(key)))(keys)
    return sample(scores, now, *draw), later


def bucket(length: int) -> int:
    """The next of a few lengths, so that prompts of all lengths share a few programs."""
    if length > 512:
        return -(-length // 512) * 512
    return max(32, 1 << (length - 1).bit_length())


def generate(
    config: LlamaConfig,
    params: Params,
    batch: Batch,
    sampling: SamplingConfig,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    keys: Key[Array, "rows"] | None = None,
    copies: int = 1,
) -> Iterator[Int[np.ndarray, "b"]]:
    """Yields a token for each row, step by step, until every row has stopped; pads follow a stop.

    Args:
      batch: prompts padded on the right (`data.rows.make_prompt_batch`), on the devices.
      keys: what each row draws with; by default it follows from the seed and the row's number.
      copies: rows that answer each prompt, one below the other.
    """
    batch = dict(batch)
    length = batch.pop("length")
    rows = length.shape[0] * copies
    seen = None
    if "next_vision_start" in batch:
        bounds = (batch.pop(f"next_vision_{end}") for end in ("start", "stop"))
        seen = Interval(*(repeat_rows(bound, copies)[:, None] for bound in bounds))
    draw, greedy = Draw.of(sampling), sampling.temperature == 0
    progress = prefill(
        config,
        params,
        batch,
        length,
        _row_keys(sampling.seed, rows) if keys is None else keys,
        draw,
        cache_length=bucket(batch["tokens"].shape[1] + sampling.max_new_tokens),
        greedy=greedy,
        copies=copies,
    )
    stops, pad = jnp.asarray(stop_ids or (-1,), jnp.int32), jnp.int32(pad_id)
    finished = np.zeros(rows, bool)
    for remaining in reversed(range(sampling.max_new_tokens)):
        token = progress.token
        if remaining:  # the device works on the next token while the host looks at this one
            token = jnp.copy(token)  # what `decode` is given is donated
            progress = decode(config, params, progress, seen, stops, pad, draw, greedy=greedy)
        tokens = np.asarray(token)
        yield tokens
        finished |= np.isin(tokens, stop_ids)
        if finished.all():
            return


def _row_keys(seed: int, rows: int) -> Key[Array, "b"]:
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))
