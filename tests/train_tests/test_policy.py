"""GRPO against its formula written out in numpy, an answer at a time."""

from functools import partial

import numpy as np
import pytest

from l32jax.config import MeshConfig
from l32jax.data.beside import Beside
from l32jax.data.rows import Batch, make_row, stack
from l32jax.data.samples import Document, Sample
from l32jax.objective_config import Grpo
from l32jax.sharding import make_mesh
from l32jax.train.policy import grpo
from tests.train_tests.comparisons import LENGTH, VISION
from tests.train_tests.small import IMAGE_ID, MODEL, TEXT
from tests.train_tests.told import gradients, logs_of, sums

LIMIT = 2e-5
MESH = MeshConfig(fsdp=2, context=2, tensor=2)
MEAN = 0.375  # of all rewards


def answered_rows(*, images: bool, count: int = 4) -> Batch:
    """Answers of different lengths; their old probabilities are drawn anew below."""
    random = np.random.default_rng(5)
    made = []
    for row in range(count):
        shown = int(images and row != 1)
        prompt = [*[IMAGE_ID] * shown, *random.integers(1, 256, 3).tolist()]
        documents = []
        for size in random.integers(1, 9, 3):
            learned = np.repeat([0.0, 1.0], [len(prompt), size])
            beside = {
                "advantage": learned * random.normal(),
                "reward": learned * MEAN,
                "old": np.zeros(len(learned)),
            }
            tokens = [*prompt, *random.integers(1, 256, size).tolist()]
            weights = (learned / size).tolist()
            documents.append(Document(tokens, weights, tuple(range(shown)), beside))
        shape = random.integers(0, 256, (28, 28 * (1 + row % 3), 3), np.uint8)
        sample = Sample(tuple(documents), (shape,) * shown)
        vision, beside = VISION if images else None, Beside.of(Grpo(), 0)
        made.append(make_row([sample], length=LENGTH, vision=vision, beside=beside))
    return stack(made)


def drawn_before(batch: Batch, policy: np.ndarray) -> Batch:
    """The same, drawn by a policy near by: some ratios are inside the clip, some on either side."""
    moved = np.random.default_rng(6).normal(0, 0.3, policy.shape)
    old = np.where(batch["weights"] > 0, policy + moved, 0)
    return batch | {"old": old.astype(np.float32)}


def by_hand(how: Grpo, batch: Batch, policy, reference) -> dict[str, float]:
    names = ("loss", "accuracy", "reward", "ratio", "clipped", "kl", "weight")
    found = dict.fromkeys(names, 0.0)
    for place in zip(*np.nonzero(batch["weights"]), strict=True):
        weight, advantage = batch["weights"][place], batch["advantage"][place]
        ratio = np.exp(policy[place] - batch["old"][place])
        lost = advantage * (1 + how.clip if advantage > 0 else 1 - how.clip)
        is_clipped = ratio * advantage > lost
        further = reference[place] - policy[place]
        kl = np.exp(further) - further - 1
        each = {
            "loss": -(lost if is_clipped else ratio * advantage) + how.kl * kl,
            "accuracy": (ratio > 1) == (advantage > 0),
            "reward": MEAN,
            "ratio": ratio,
            "clipped": is_clipped,
            "kl": kl,
            "weight": 1,
        }
        found = {name: found[name] + weight * each[name] for name in names}
    return found if how.kl else {name: found[name] for name in names if name != "kl"}


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("how", [Grpo(), Grpo(clip=0.05), Grpo(kl=0.4)], ids=repr)
def test_grpo_is_the_formula(how, images):
    config, batch = MODEL if images else TEXT, answered_rows(images=images)
    policy, reference = (logs_of(config, batch, seed) for seed in (0, 1))
    batch = drawn_before(batch, policy)
    others = (("reference", 1),) if how.kl else ()
    found = sums(partial(grpo, how=how), config, batch, others=others)
    expected = by_hand(how, batch, policy, reference)
    assert found == pytest.approx(expected, rel=LIMIT, abs=LIMIT)
    assert found["weight"] == pytest.approx(12) and 0 < found["clipped"] < 12


def test_tokens_beyond_the_clip_teach_nothing():
    """As of a policy that has gone as far as it may, in the direction it was to go."""
    batch = answered_rows(images=False)
    beyond = np.sign(batch["advantage"]) * 0.5
    old = (logs_of(TEXT, batch, 0) - beyond).astype(np.float32)
    found = gradients(partial(grpo, how=Grpo()), TEXT, batch | {"old": old})
    assert not any(leaf.any() for leaf in found.values())
    back = gradients(partial(grpo, how=Grpo()), TEXT, batch | {"old": old + 2 * beyond})
    assert any(leaf.any() for leaf in back.values())


def test_on_a_mesh_gradients_are_the_same():
    batch = answered_rows(images=True, count=8)
    batch = drawn_before(batch, logs_of(MODEL, batch, 0))
    objective = partial(grpo, how=Grpo())
    expected = gradients(objective, MODEL, batch)
    found = gradients(objective, MODEL, batch, make_mesh(MESH))
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-5 * largest, err_msg=path)
