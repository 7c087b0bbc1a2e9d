"""What is dead goes unnoticed, what stays is where it was, and every model in between is whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.compress.attention import rotary_dims
from l32jax.compress.prune import prune
from l32jax.compress.target import require_reachable, resized
from l32jax.compress.weights import transferred
from l32jax.config import LlamaConfig, LoraConfig, MeshConfig
from l32jax.errors import InputError
from l32jax.model.rope import cos_sin, frequencies, rotate
from l32jax.presets import (
    LLAMA3_1_8B,
    LLAMA3_1_70B,
    LLAMA3_2_1B,
    LLAMA3_2_3B,
    LLAMA3_2_11B_VISION_INSTRUCT,
    LLAMA3_2_90B_VISION,
)
from l32jax.sharding import make_mesh, single_device_mesh
from tests.checkpoint_tests.weights import random_params
from tests.compress_tests.models import MODELS, TEXT, batches, logits

SMALLER = {
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
    "embed_dim": 32,
    "tied_embedding": True,
}
MESHES = {"text": single_device_mesh, "vision": lambda: make_mesh(MeshConfig(data=2, tensor=2))}


def pruned(config: LlamaConfig, params, target: LlamaConfig, mesh):
    sets = batches(config, mesh)
    return prune(config, params, sets, sets[:1], target)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_pruned_to_its_own_size_is_itself(name):
    config, mesh = MODELS[name], single_device_mesh()
    with jax.set_mesh(mesh):
        params = random_params(config, mesh)
        found = pruned(config, params, config, mesh)
    assert found.config == config and [step.name for step in found.steps] == ["whole"]
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, params))


class Dead:
    """Draws what is dead of a model, and kills it."""

    def __init__(self, config: LlamaConfig, target: LlamaConfig, seed: int):
        self.before, self.after = config.decoder, target.decoder
        self.random = np.random.default_rng(seed)

    def some(self, size: str) -> np.ndarray:
        """Indices of what will have to go."""
        before, after = getattr(self.before, size), getattr(self.after, size)
        return self.random.permutation(before)[after:]

    def kill(self, params):
        params = jax.tree.map(np.array, params)
        channels, groups = self.some("embed_dim"), self.some("num_groups")
        decoder = params["decoder"]
        for block in decoder["groups"]["blocks"].values():
            for group in range(self.before.num_groups):
                self.kill_inside(block, group)
            for part, name in (("attention", "out"), ("mlp", "down")):
                block[part][name]["weight"][groups] = 0
                block[part][name]["weight"][:, channels] = 0
        for name in ("embedding", "image_embedding"):
            if name in decoder:
                decoder[name]["weight"][:, channels] = 0
        if "head" in decoder:
            decoder["head"]["weight"] = 3 * decoder["embedding"]["weight"]
        if "projector" in params:
            unseen = self.some("embed_dim")
            params["projector"]["weight"][unseen] = params["projector"]["bias"][unseen] = 0
        return params

    def kill_inside(self, block, group: int) -> None:
        attention, mlp = block["attention"], block["mlp"]
        mlp["up"]["weight"][group, self.some("mlp_dim")] = 0
        shared = self.before.num_heads // self.before.num_kv_heads
        for kv_head in range(self.before.num_kv_heads):
            heads = kv_head * shared + self.random.permutation(shared)
            left = self.after.num_heads // self.after.num_kv_heads
            attention["out"]["weight"][group, :, heads[left:]] = 0
            attention["value"]["weight"][group, kv_head, self.some("head_dim")] = 0
        if "query_norm" in attention:
            dims = self.some("head_dim")
        else:
            kept = rotary_dims(self.before.head_dim, self.after.head_dim)
            dims = np.setdiff1d(np.arange(self.before.head_dim), kept)
        for name in ("query", "key"):
            attention[name]["weight"][group][:, dims] = 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_dead_goes_and_nothing_is_noticed(name, seed):
    config = resized(MODELS[name], norm_eps=1e-12)
    target = resized(config, num_groups=config.decoder.num_groups - 1, **SMALLER)
    mesh = MESHES[name]()
    with jax.set_mesh(mesh):
        params = Dead(config, target, seed).kill(random_params(config, mesh, seed=1))
        params = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding),
            params,
            random_params(config, mesh),
        )
        batch = batches(config, mesh)[0]
        found = pruned(config, params, target, mesh)
        expected = np.asarray(logits(config, params, batch))
        small = np.asarray(logits(found.config, found.params, batch))
    np.testing.assert_allclose(small, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    losses = [step.perplexity for step in found.steps]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


@pytest.mark.slow
def test_a_reward_model_stays_one():
    config, mesh = dataclasses.replace(TEXT, reward_head=True), single_device_mesh()
    with jax.set_mesh(mesh):
        params = random_params(config, mesh)
        found = pruned(config, params, resized(config, embed_dim=32), mesh)
    (kept,) = (step.chosen["channels"] for step in found.steps if step.name == "embedding")
    expected = np.asarray(params["decoder"]["reward_head"]["weight"])[:, kept]
    assert np.array_equal(found.params["decoder"]["reward_head"]["weight"], expected)


def test_a_model_with_lora_is_refused():
    lora = LoraConfig(rank=2, alpha=4.0)
    config = dataclasses.replace(TEXT, decoder=dataclasses.replace(TEXT.decoder, lora=lora))
    with pytest.raises(InputError, match="it has LoRA; merge that first"):
        require_reachable(config, resized(config, mlp_dim=48))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_stays_bfloat16(name):
    config, mesh = MODELS[name], single_device_mesh()
    with jax.set_mesh(mesh):
        params = random_params(config, mesh)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        found = pruned(config, params, resized(config, **SMALLER), mesh)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite([step.perplexity for step in found.steps]).all()


@pytest.mark.parametrize("shorter", [64, 32])
def test_rotary_pairs_that_stay_turn_as_before(shorter):
    random = np.random.default_rng(0)
    dims = rotary_dims(128, shorter)
    rope = {"theta": 500_000.0, "scaling": LLAMA3_1_8B.decoder.rope_scaling}
    short = random.standard_normal((2, 1, 50, 3, shorter)).astype(np.float32)
    long = np.zeros((*short.shape[:-1], 128), np.float32)
    long[..., dims] = short
    positions = jnp.asarray(np.sort(random.integers(0, 100_001, (1, 50))), jnp.int32)

    def scores(queries_and_keys):
        turns = cos_sin(positions, frequencies(queries_and_keys.shape[-1], **rope))
        q, k = (np.asarray(rotate(jnp.asarray(x), *turns)) for x in queries_and_keys)
        return np.einsum("btnh,bsnh->bnts", q, k)

    np.testing.assert_allclose(scores(short), scores(long), rtol=0, atol=1e-5 * shorter**0.5)


def scaled_down(config: LlamaConfig) -> LlamaConfig:
    decoder = config.decoder
    return resized(
        config,
        vocab_size=512,
        embed_dim=decoder.embed_dim // 64,
        mlp_dim=decoder.mlp_dim // 64,
        head_dim=decoder.head_dim // 16,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", [LLAMA3_2_1B, LLAMA3_2_3B])
def test_the_way_from_8b_is_gone_in_small(target):
    """As many layers and heads as 8B has, of which as many go."""
    config, small, mesh = scaled_down(LLAMA3_1_8B), scaled_down(target), single_device_mesh()
    with jax.set_mesh(mesh):
        found = pruned(config, random_params(config, mesh), small, mesh)
        like = random_params(small, mesh)
    assert found.config == small
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, found.params, like))
    assert np.isfinite([step.perplexity for step in found.steps]).all()


SMALL_VISION = resized(
    LLAMA3_2_90B_VISION, num_groups=8, num_heads=32, mlp_dim=14_336, embed_dim=4096
)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (LLAMA3_1_8B, LLAMA3_2_1B),
        (LLAMA3_1_8B, LLAMA3_2_3B),
        (LLAMA3_1_70B, LLAMA3_1_8B),
        (LLAMA3_2_90B_VISION, LLAMA3_2_11B_VISION_INSTRUCT),
        (LLAMA3_2_90B_VISION, SMALL_VISION),
    ],
)
def test_the_family_can_be_pruned_to_its_smaller_members(source, target):
    require_reachable(source, target)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        (LLAMA3_2_1B, LLAMA3_2_3B, "num_groups=28"),
        (LLAMA3_2_3B, LLAMA3_2_1B, "num_heads=32"),
        (LLAMA3_2_11B_VISION_INSTRUCT, LLAMA3_2_1B, "image encoder"),
        (LLAMA3_2_1B, resized(LLAMA3_2_1B, head_dim=48), "head_dim=48"),
        (LLAMA3_2_1B, resized(LLAMA3_2_1B, num_kv_heads=4), "num_kv_heads=4"),
        (LLAMA3_2_1B, resized(LLAMA3_2_1B, tied_embedding=False), "tied_embedding"),
        (LLAMA3_2_1B, resized(LLAMA3_2_1B, rope_theta=1e4), "rope_theta"),
    ],
)
def test_a_target_that_is_more_or_other_than_the_model_is_refused(source, target, said):
    with pytest.raises(InputError, match=said):
        require_reachable(source, target)


def test_a_target_that_the_mesh_cannot_divide_is_refused():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh), pytest.raises(InputError, match="embed_dim=30.*axis fsdp"):
        prune(TEXT, random_params(TEXT, mesh), [], [], resized(TEXT, embed_dim=30))


@given(seed=st.integers(0, 2**32 - 1))
def test_what_removed_inputs_tell_is_taken_over(seed):
    """Where they are sums of kept ones, nothing is lost."""
    random = np.random.default_rng(seed)
    kept = np.sort(random.permutation(12)[:7])
    inputs = random.standard_normal((300, 12))
    rest = np.setdiff1d(np.arange(12), kept)
    inputs[:, rest] = inputs[:, kept] @ random.standard_normal((7, 5))
    weight = random.standard_normal((4, 12))
    found = inputs[:, kept] @ transferred(weight, inputs.T @ inputs / 300, kept).T
    exact = inputs @ weight.T
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
