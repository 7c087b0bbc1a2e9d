"""DPO and reward models against formulas written out in numpy, an answer at a time."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.config import MeshConfig
from l32jax.data.batches import place
from l32jax.model.llama import bind, forward_batch
from l32jax.model.parameters import combine, flatten, partition, trains
from l32jax.objective_config import Dpo, Reward
from l32jax.sharding import make_mesh
from l32jax.train import chunks
from l32jax.train.preferences import dpo, reward
from l32jax.train.step import begin_stage, make_train_step
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.comparisons import LENGTH, compared_rows
from tests.train_tests.small import MODEL, TEXT, stage
from tests.train_tests.told import ONE, gradients, logs_of, sums

LIMIT = 2e-5
RANKED = {model: dataclasses.replace(model, reward_head=True) for model in (TEXT, MODEL)}
MESHES = [MeshConfig(fsdp=2, context=2, tensor=2), MeshConfig(data=2, fsdp=2, context=2)]
WAYS = [
    Dpo(),
    Dpo(beta=0.5, nll=0.0, mask_format=False),
    Dpo(loss="ipo", length_normalised=True),
    Dpo(length_normalised=True, nll=1.0, beta=2.0),
    Dpo(reference="data"),
]


def comparisons(batch):
    """(row, places of the better answer, places of the worse one, margin) of each."""
    for row, pairs in enumerate(batch["pairs"]):
        for (better, worse), margin in zip(pairs, batch["margin"][row], strict=True):
            if better >= 0:
                answers = (np.flatnonzero(batch["document"][row] == d) for d in (better, worse))
                yield row, *answers, margin


def dpo_by_hand(how: Dpo, batch, policy, reference) -> dict[str, float]:
    found = {name: 0.0 for name in ("loss", "accuracy", "margin", "better_gain", "nll", "weight")}
    for row, better, worse, _ in comparisons(batch):
        gains = []
        for places in (better, worse):
            counts = batch["weights"][row, places] > 0
            if how.mask_format:
                counts &= batch["format"][row, places] == 0
            gain = (policy - reference)[row, places][counts]
            gains.append(gain.mean() if how.length_normalised else gain.sum())
        nll = -policy[row, better][batch["weights"][row, better] > 0].mean()
        gap = gains[0] - gains[1]
        loss = np.log1p(np.exp(-how.beta * gap))
        if how.loss == "ipo":
            loss = (gap - 1 / (2 * how.beta)) ** 2
        each = (loss + how.nll * nll, gap > 0, gap, gains[0], nll, 1)
        found = {name: found[name] + v for name, v in zip(found, each, strict=True)}
    return found


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("how", WAYS, ids=repr)
def test_dpo_is_the_formula(how, images):
    config, batch = MODEL if images else TEXT, compared_rows(how, images=images)
    policy = logs_of(config, batch, 0)
    others = () if how.reference == "data" else (("reference", 1),)
    reference = batch["reference"] if how.reference == "data" else logs_of(config, batch, 1)
    found = sums(partial(dpo, how=how), config, batch, others=others)
    expected = dpo_by_hand(how, batch, policy, reference)
    assert found == pytest.approx(expected, rel=LIMIT, abs=LIMIT) and found["weight"] == 9


def rewards_by_hand(config, batch) -> list[tuple[float, float, float]]:
    with jax.set_mesh(ONE):
        params = random_params(config)
        run = jax.jit(lambda p, b: forward_batch(bind(config, p), b).states)
        states = np.asarray(run(params, place(batch, ONE)), np.float64)
    head = np.asarray(params["decoder"]["reward_head"]["weight"], np.float64)[0]
    return [
        (states[row, better[-1]] @ head, states[row, worse[-1]] @ head, margin)
        for row, better, worse, margin in comparisons(batch)
    ]


@pytest.mark.parametrize("how", [Reward(), Reward(margin=0.7, l2=0.01)], ids=repr)
@pytest.mark.parametrize("model", [TEXT, MODEL], ids=["text", "vision"])
def test_a_reward_is_read_in_the_last_token_and_ranks(model, how):
    config, batch = RANKED[model], compared_rows(how, images=model is MODEL)
    each = rewards_by_hand(config, batch)
    squared = sum((b**2 + w**2) / 2 for b, w, _ in each)
    expected = {
        "loss": sum(np.log1p(np.exp(-(b - w - how.margin * m))) for b, w, m in each)
        + how.l2 * squared,
        "accuracy": sum(b > w for b, w, _ in each),
        "margin": sum(b - w for b, w, _ in each),
        "squared": squared,
        "weight": 9,
    }
    found = sums(partial(reward, how=how), config, batch)
    assert found == pytest.approx(expected, rel=LIMIT, abs=LIMIT)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_on_a_mesh_and_by_chunks_gradients_are_the_same(kind, mesh, monkeypatch):
    how = Dpo(reference="data", beta=1.0) if kind == "dpo" else Reward(l2=0.1)
    config = MODEL if kind == "dpo" else RANKED[MODEL]
    objective = partial(dpo if kind == "dpo" else reward, how=how)
    batch = compared_rows(how, images=True, count=8)
    expected = gradients(objective, config, batch)
    monkeypatch.setattr(chunks, "MAX_LOGITS", 4 * config.decoder.vocab_size)
    found = gradients(objective, config, batch, make_mesh(mesh))
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-5 * largest, err_msg=path)


def preference_stage(how: Dpo, trained=("vision_tower", "adapter")):
    plain = stage(trained)
    data = dataclasses.replace(plain.data, length=LENGTH, max_pairs=4, max_images=2)
    return dataclasses.replace(plain, data=data, objective=how)


def trained(how: Dpo, steps: int):
    chosen = preference_stage(how)
    with jax.set_mesh(ONE):
        batch = place(compared_rows(how, images=True), ONE)
        step = make_train_step(MODEL, chosen, partial(dpo, how=how))
        states = [begin_stage(MODEL, chosen, random_params(MODEL), seed=0)]
        metrics = []
        for _ in range(steps):
            kept = jax.tree.map(jnp.copy, states[-1])
            after, told = step(kept, batch, jnp.float32(1e-3))
            states.append(after)
            metrics.append(jax.tree.map(float, told))
    return states, metrics


def test_dpo_begins_where_policy_and_reference_agree_and_goes_downhill():
    _, metrics = trained(Dpo(nll=0.0), 4)
    assert metrics[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    losses = [each["loss"] for each in metrics]
    assert losses == sorted(losses, reverse=True) and metrics[-1]["margin"] > 0


def test_the_reference_stays_and_an_average_follows_when_it_is_due():
    is_seeing = trains(("vision_tower", "adapter"), MODEL)
    states, _ = trained(Dpo(reference="ema", ema_decay=0.75, refresh_every=2), 4)
    for done, state in enumerate(states[1:], 1):
        before = flatten(states[done - 1].reference)
        policy = flatten(partition(state.params, is_seeing)[0])
        moves = 0.25 if done % 2 == 0 else 0.0
        for path, leaf in flatten(state.reference).items():
            expected = (1 - moves) * before[path] + moves * policy[path]
            np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7, err_msg=path)
    (first, *_, last), _ = trained(Dpo(), 2)
    for path, leaf in flatten(last.reference).items():
        np.testing.assert_array_equal(leaf, flatten(first.reference)[path])


def test_dpo_leaves_the_trunk_as_it_is_bit_by_bit():
    (first, *_, last), _ = trained(Dpo(), 3)
    is_seeing = trains(("vision_tower", "adapter"), MODEL)
    before, after = flatten(first.params), flatten(last.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == set(filter(is_seeing, before)) and len(moved) < len(before)
    restored = combine(first.reference, partition(last.params, is_seeing)[1])
    assert flatten(restored).keys() == before.keys()
