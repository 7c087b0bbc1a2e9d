"""Generation gives what repeated full passes would, whatever stands beside it in the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.api import load
from l32jax.config import MeshConfig, SamplingConfig
from l32jax.data.batches import place
from l32jax.data.rows import VisionShape, make_prompt_batch
from l32jax.errors import InputError
from l32jax.generate import decode as generation
from l32jax.generate.model import Model
from l32jax.model.attention import Interval
from l32jax.model.cache import empty_cache
from l32jax.model.llama import Images, bind, forward
from l32jax.presets import SMOLLM2_135M
from l32jax.sharding import make_mesh, single_device_mesh
from tests import golden
from tests.checkpoint_tests.weights import random_params
from tests.data_tests.real_tokenizers import smollm2_file
from tests.smollm2 import transformers_model

IMAGE_ID = golden.VISION.decoder.vocab_size
LIMIT = 1e-5
CACHE_LENGTH = 32


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def words(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, IMAGE_ID, length).tolist()


# Text before an image; text alone; two images, of several tiles; an image at once.
PROMPTS = [
    ([*words(0, 3), IMAGE_ID, *words(1, 7)], [picture(0, 50, 100)]),
    (words(2, 5), []),
    ([IMAGE_ID, *words(3, 4), IMAGE_ID, *words(4, 6)], [picture(1, 56, 56), picture(2, 100, 100)]),
    ([IMAGE_ID, *words(5, 1)], [picture(3, 100, 50)]),
]


@pytest.fixture(scope="module")
def params():
    """Random gates among them: at zero, images would change nothing."""
    return golden.load_meta("mllama_tiny_meta", golden.VISION)


@pytest.fixture(scope="module")
def model(params):
    return Model(golden.VISION, params, None, single_device_mesh())


def prompt_batch(prompts, length: int):
    vision = VisionShape.of(golden.VISION, max_images=2, max_tiles=4)
    batch = make_prompt_batch(prompts, length=length, vision=vision)
    return place(batch, single_device_mesh())


@partial(jax.jit, static_argnums=0)
def full_logits(config, params, batch):
    model = bind(config, params)
    states = forward(
        model,
        batch["tokens"],
        batch["positions"],
        Interval(batch["start"], batch["stop"]),
        seen_images=Interval(batch["vision_start"], batch["vision_stop"]),
        images=Images(batch["tiles"], batch["aspect"], batch["tile_index"]),
    ).states
    return model.decoder.logits(states)


@partial(jax.jit, static_argnums=0)
def first_logits(config, params, batch):
    """Those of the first token of each row, and the cache that it leaves behind."""
    model = bind(config, params)
    rows, slots = batch["tile_index"].shape
    vision_length = slots * config.vision.tokens_per_tile
    cache = empty_cache(
        config, batch=rows, length=CACHE_LENGTH, vision_length=vision_length, dtype=jnp.float32
    )
    first = {name: batch[name][:, :1] for name in ("tokens", "positions", "start", "stop")}
    states, cache = forward(
        model,
        first["tokens"],
        first["positions"],
        Interval(first["start"], first["stop"]),
        seen_images=Interval(batch["vision_start"][:, :1], batch["vision_stop"][:, :1]),
        images=Images(batch["tiles"], batch["aspect"], batch["tile_index"]),
        cache=cache,
        write_at=jnp.zeros(rows, jnp.int32),
    )
    return model.decoder.logits(states)[:, 0], cache


@partial(jax.jit, static_argnums=0)
def next_logits(config, params, cache, token, position, seen):
    """One more token a row: no images come in, only what the cache holds of them."""
    model = bind(config, params)
    text = Interval(jnp.zeros_like(position)[:, None], position[:, None] + 1)
    states, cache = forward(
        model,
        token[:, None],
        position[:, None],
        text,
        seen_images=Interval(*(bound[:, None] for bound in seen)),
        cache=cache,
        write_at=position,
    )
    return model.decoder.logits(states)[:, 0], cache


def decoded_logits(config, params, batch) -> np.ndarray:
    """Of the same tokens as `full_logits`, one after the other."""
    scores, cache = first_logits(config, params, batch)
    found = [scores]
    for index in range(1, batch["tokens"].shape[1]):
        token, start, stop = (
            batch[name][:, index] for name in ("tokens", "vision_start", "vision_stop")
        )
        position = jnp.full_like(token, index)
        scores, cache = next_logits(config, params, cache, token, position, Interval(start, stop))
        found.append(scores)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("row_mask", ["meta", "hf"])
def test_a_full_pass_equals_token_by_token_decoding(row_mask, params):
    config = golden.with_compat(golden.VISION, row_mask=row_mask)
    batch = prompt_batch(PROMPTS, length=12)
    with jax.set_mesh(single_device_mesh()):
        full = np.asarray(full_logits(config, params, batch))
        decoded = decoded_logits(config, params, batch)
    for row, (tokens, _) in enumerate(PROMPTS):
        ours, theirs = decoded[row, : len(tokens)], full[row, : len(tokens)]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT)


def greedy_by_full_passes(model, prompt, num_tokens: int) -> list[int]:
    tokens, images = list(prompt[0]), prompt[1]
    for _ in range(num_tokens):
        batch = prompt_batch([(tokens, images)], length=24)
        with jax.set_mesh(model.mesh):
            scores = full_logits(model.config, model.params, batch)
        tokens.append(int(scores[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt[0]) :]


@pytest.fixture(scope="module")
def together(model) -> list[list[int]]:
    """Eight tokens after each prompt, generated side by side."""
    return model.generate_tokens(PROMPTS, max_new_tokens=8)


def test_greedy_tokens_are_those_of_repeated_full_passes(model, together):
    for prompt, ours in zip(PROMPTS, together, strict=True):
        assert ours == greedy_by_full_passes(model, prompt, 8)
    assert len(set(map(tuple, together))) == len(PROMPTS)


@pytest.mark.parametrize("order", [[3, 1, 2, 0], [0, 0, 2, 2]])
def test_rows_do_not_change_their_neighbours(order, model, together):
    prompts = [PROMPTS[row] for row in order]
    assert model.generate_tokens(prompts, max_new_tokens=8) == [together[row] for row in order]


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_alone_gives_what_it_gives_in_company(row, model, together):
    assert model.generate_tokens([PROMPTS[row]], max_new_tokens=8) == [together[row]]


def test_the_cache_that_a_prompt_leaves_does_not_depend_on_its_neighbours(params):
    """Not a matter of close scores: every key and value, bit by bit."""

    def cache_after(prompts):
        batch = prompt_batch(prompts, length=12)
        length = batch.pop("length")
        return run_prefill(golden.VISION, params, batch, length, 32).cache

    with jax.set_mesh(single_device_mesh()):
        one, other = (cache_after([PROMPTS[0], p, PROMPTS[2], p]) for p in (PROMPTS[1], PROMPTS[3]))
    one, other = (map(np.asarray, jax.tree.leaves(cache)) for cache in (one, other))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a[:, [0, 2]], b[:, [0, 2]])
        assert not np.array_equal(a[:, [1, 3]], b[:, [1, 3]])


def run_prefill(config, params, batch, length, cache_length, *, greedy=True):
    batch = {name: array for name, array in batch.items() if not name.startswith("next_")}
    return generation.prefill(
        config,
        params,
        batch,
        length,
        generation._row_keys(0, len(length)),
        generation.Draw.of(SamplingConfig()),
        cache_length=cache_length,
        greedy=greedy,
    )


def test_decoding_gets_no_images_and_leaves_their_keys_and_values_alone(params):
    batch = prompt_batch(PROMPTS, length=12)
    length, seen = batch.pop("length"), ("next_vision_start", "next_vision_stop")
    with jax.set_mesh(single_device_mesh()):
        progress = run_prefill(golden.VISION, params, batch, length, CACHE_LENGTH)
        slot = golden.VISION.decoder.group_pattern.index("cross")
        before = jax.tree.map(np.array, progress.cache[slot])
        assert all(np.abs(array).max() > 0.1 for array in before)
        seen = Interval(*(batch[name][:, None] for name in seen))
        stops, pad = jnp.asarray([-1]), jnp.int32(0)
        draw = generation.Draw.of(SamplingConfig())
        for _ in range(2):
            progress = generation.decode(
                golden.VISION, params, progress, seen, stops, pad, draw, greedy=True
            )
    for old, new in zip(before, progress.cache[slot], strict=True):
        np.testing.assert_array_equal(old, new)


def test_cached_keys_carry_their_norm(params):
    """The cross-attention cache is what the blocks make of the images: normalised keys, values."""
    batch = prompt_batch(PROMPTS, length=12)
    slot = golden.VISION.decoder.group_pattern.index("cross")

    @jax.jit
    def expected(params, batch):
        model = bind(golden.VISION, params)
        images = Images(batch["tiles"], batch["aspect"], batch["tile_index"])
        vision = model.vision_tokens(images.normalised(jnp.float32))
        return jax.vmap(lambda block: block.attention.keys_and_values(vision))(
            model.decoder.groups.blocks[slot]
        )

    with jax.set_mesh(single_device_mesh()):
        _, cache = first_logits(golden.VISION, params, batch)
        for ours, theirs in zip(cache[slot], expected(params, batch), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("size", [40, 100])
def test_cache_and_prompt_buckets_do_not_change_results(size, model, together, monkeypatch):
    monkeypatch.setattr("l32jax.generate.decode.bucket", lambda length: size)
    monkeypatch.setattr("l32jax.generate.model.bucket", lambda length: size - 24)
    assert model.generate_tokens(PROMPTS, max_new_tokens=8) == together


def test_buckets_are_few_and_hold_what_they_must():
    sizes = {length: generation.bucket(length) for length in range(1, 5000)}
    assert all(size >= length for length, size in sizes.items())
    assert all(size <= max(32, 2 * length) for length, size in sizes.items())
    assert len(set(sizes.values())) == 14


@pytest.mark.slow
def test_unrolled_and_rolled_scans_agree(params, monkeypatch):
    batch = prompt_batch(PROMPTS, length=12)
    with jax.set_mesh(single_device_mesh()):
        rolled, _ = first_logits(golden.VISION, params, batch)
        monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
        unrolled, _ = jax.jit(first_logits.__wrapped__, static_argnums=0)(
            golden.VISION, params, batch
        )
    np.testing.assert_allclose(unrolled, rolled, rtol=0, atol=LIMIT)


def steps(model, prompts, stop_ids, **sampling) -> list[list[int]]:
    batch = prompt_batch(prompts, length=32)
    with jax.set_mesh(model.mesh):
        found = generation.generate(
            model.config,
            model.params,
            batch,
            SamplingConfig(**sampling),
            stop_ids=stop_ids,
            pad_id=7,
        )
        return np.stack(list(found), axis=1).tolist()


def test_pads_follow_a_stop_token_and_other_rows_go_on(model, together):
    stop = together[0][2]
    expected = []
    for row in together:
        end = row.index(stop) + 1 if stop in row else len(row)
        expected.append(row[:end] + [7] * (8 - end))
    assert expected[0][:2] == together[0][:2] and expected[0][3:] == [7] * 5
    assert any(7 not in row for row in expected)
    assert steps(model, PROMPTS, (stop,), max_new_tokens=8) == expected


def test_generation_ends_when_every_row_has_stopped(model, together):
    firsts = tuple({row[1] for row in together} | {row[0] for row in together[:1]})
    ended = steps(model, PROMPTS, firsts, max_new_tokens=8)
    assert len(ended[0]) <= 2


def test_the_same_seed_draws_the_same_tokens(model):
    how = {"max_new_tokens": 6, "temperature": 1.5, "top_p": 0.9}
    drawn = model.generate_tokens(PROMPTS, seed=1, **how)
    assert drawn == model.generate_tokens(PROMPTS, seed=1, **how)
    assert drawn != model.generate_tokens(PROMPTS, seed=2, **how)


def test_rows_that_share_a_prompt_are_as_if_each_had_read_it(model):
    keys = jax.vmap(jax.random.key)(np.arange(12))
    how = {"max_new_tokens": 6, "temperature": 1.5, "keys": keys}
    apart = model.generate_tokens([prompt for prompt in PROMPTS for _ in range(3)], **how)
    assert model.generate_tokens(PROMPTS, copies=3, **how) == apart
    assert len(set(map(tuple, apart))) == len(apart)


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8)])
def test_rows_that_share_a_prompt_stay_on_their_devices(mesh):
    """Three prompts: the mesh fills up with copies of the last, and they draw as it does."""
    keys = jax.vmap(jax.random.key)(np.arange(6))
    prompts = [(words(9, 4), []), (words(8, 9), []), (words(7, 2), [])]

    def ask(mesh):
        model = Model(golden.TEXT, random_params(golden.TEXT, mesh), None, mesh)
        how = {"max_new_tokens": 6, "temperature": 1.5, "keys": keys}
        return model.generate_tokens(prompts, copies=2, **how)

    assert ask(make_mesh(mesh)) == ask(single_device_mesh())


def test_sampling_settings_compile_nothing_new(model):
    model.generate_tokens(PROMPTS, max_new_tokens=2, temperature=0.5)
    before = generation.decode._cache_size(), generation.prefill._cache_size()
    model.generate_tokens(PROMPTS, max_new_tokens=2, temperature=1.0, top_k=3, top_p=0.5, min_p=0.1)
    assert (generation.decode._cache_size(), generation.prefill._cache_size()) == before


def test_a_text_model_generates_what_its_full_passes_say():
    model = Model(golden.TEXT, random_params(golden.TEXT), None, single_device_mesh())
    prompts = [(words(9, 4), []), (words(8, 9), [])]
    generated = model.generate_tokens(prompts, max_new_tokens=6)
    for (tokens, _), ours in zip(prompts, generated, strict=True):
        scores = model.logits([*tokens, *ours, *words(7, 9 - len(tokens))])
        assert ours == scores[len(tokens) - 1 :][:6].argmax(axis=-1).tolist()


@pytest.mark.slow
def test_greedy_continuations_of_smollm2_equal_transformers():
    torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
    path = smollm2_file()
    model = load(path)
    assert model.config == SMOLLM2_135M
    theirs = transformers_model(path)
    texts = ["The capital of France is", "Once upon a time, a small robot", "def fibonacci(n):"]
    prompts = [model.encode(text, raw=True) for text in texts]
    for (tokens, _), ours in zip(
        prompts, model.generate_tokens(prompts, max_new_tokens=20), strict=True
    ):
        whole = [*tokens, *ours]
        with torch.no_grad():
            scores = theirs(torch.tensor([whole])).logits[0].numpy()
        close = np.abs(model.logits(whole) - scores).max()
        assert close < 1e-4 * np.abs(scores).max()
        # One pass tells as much as one a token: tokens agree if each is the best after the others.
        assert ours == scores[len(tokens) - 1 : -1].argmax(axis=-1).tolist()


def test_a_mesh_that_splits_rows_is_refused():
    """By what asks it: training on such a mesh ends with a model too."""
    model = Model(golden.TEXT, random_params(golden.TEXT), None, make_mesh(MeshConfig(context=2)))
    for ask in (model.logits, lambda tokens: model.generate_tokens([(tokens, [])])):
        with pytest.raises(InputError, match="context axis has 2 devices"):
            ask([1, 2, 3])
