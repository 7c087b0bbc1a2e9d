"""Divergences against PyTorch's and numpy's, and teachers asked now against what they left."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.config import MeshConfig
from l32jax.data.batches import place
from l32jax.model.llama import bind
from l32jax.model.parameters import flatten
from l32jax.objective_config import Distill, Teacher
from l32jax.sharding import make_mesh
from l32jax.train import chunks
from l32jax.train.distillation import distill
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import MODEL, TEXT, rows
from tests.train_tests.told import ONE, log_softmax, logits_of, of_targets

LIMIT = 2e-5
VOCABULARY = TEXT.decoder.vocab_size
WIDER = dataclasses.replace(
    TEXT, decoder=dataclasses.replace(TEXT.decoder, embed_dim=96, num_groups=2)
)
WIDER_SEEING = dataclasses.replace(
    MODEL, decoder=dataclasses.replace(MODEL.decoder, embed_dim=96, num_groups=1)
)
MESH = MeshConfig(fsdp=2, context=2, tensor=2)
WAYS = [
    Distill(top_k=VOCABULARY),
    Distill(top_k=VOCABULARY, divergence="reverse_kl", temperature=2.0),
    Distill(top_k=VOCABULARY, divergence="jsd", beta=0.3, share=0.5),
    Distill(top_k=VOCABULARY, share=0.25, temperature=0.5),
]


def asking(how: Distill, *models) -> Distill:
    """The same with teachers, the first of which counts most."""
    named = (Teacher(model=m, start_from="none", weight=1 / (1 + n)) for n, m in enumerate(models))
    return dataclasses.replace(how, top_k=0, teachers=tuple(named))


def weighted(batch):
    random = np.random.default_rng(1).uniform(0.5, 2, batch["weights"].shape)
    return batch | {"weights": (batch["weights"] * random).astype(np.float32)}


def computed(how, config, batch, teachers=(), mesh=ONE):
    """The sums, and the gradients of the student."""

    def loss(params, taught_by, batch):
        models = [bind(*each) for each in zip(teachers, taught_by, strict=True)]
        model = bind(config, params)
        return distill(model, batch, jax.random.key(0), how=how, teachers=models)

    with jax.set_mesh(mesh):
        params = random_params(config, mesh)
        taught_by = [random_params(each, mesh, seed=1 + n) for n, each in enumerate(teachers)]
        run = jax.jit(jax.grad(loss, has_aux=True))
        grads, sums = run(params, taught_by, place(batch, mesh))
    return jax.tree.map(float, sums), {p: np.asarray(g) for p, g in flatten(grads).items()}


def mixture(how: Distill, scores) -> np.ndarray:
    weights = np.array([teacher.weight for teacher in how.teachers])
    each = [np.exp(log_softmax(score / how.temperature)) for score in scores]
    return np.einsum("i,i...->...", weights / weights.sum(), each)


def by_hand(how, batch, own, p) -> dict[str, float]:
    log_q = log_softmax(own / how.temperature)
    q, m = np.exp(log_q), how.beta * p + (1 - how.beta) * np.exp(log_q)
    divergence = {
        "forward_kl": (p * np.log(p / q)).sum(-1),
        "reverse_kl": (q * np.log(q / p)).sum(-1),
        "jsd": how.beta * (p * np.log(p / m)).sum(-1)
        + (1 - how.beta) * (q * np.log(q / m)).sum(-1),
    }[how.divergence]
    true = of_targets(log_softmax(own), batch)
    weights = batch["weights"]
    found = {"divergence": (divergence * weights).sum(), "cross_entropy": -(true * weights).sum()}
    found["loss"] = how.share * how.temperature**2 * found["divergence"]
    found["loss"] += (1 - how.share) * found["cross_entropy"]
    return found


@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.divergence}-{how.temperature}")
def test_two_teachers_asked_in_the_step_are_the_formula(how):
    how, batch = asking(how, WIDER, TEXT), weighted(rows(4, images=False))
    scores = [logits_of(config, batch, 1 + n) for n, config in enumerate((WIDER, TEXT))]
    found, _ = computed(how, TEXT, batch, (WIDER, TEXT))
    expected = by_hand(how, batch, logits_of(TEXT, batch, 0), mixture(how, scores))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=LIMIT), name
    assert found["weight"] == pytest.approx(batch["weights"].sum(), rel=LIMIT)


def test_the_divergence_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    how, batch = asking(WAYS[0], WIDER), rows(4, images=False)
    own, taught = (
        torch.log_softmax(torch.tensor(logits_of(c, batch, s)), -1)
        for c, s in ((TEXT, 0), (WIDER, 1))
    )
    each = torch.nn.functional.kl_div(own, taught, log_target=True, reduction="none").sum(-1)
    expected = float((each * torch.tensor(batch["weights"])).sum())
    assert computed(how, TEXT, batch, (WIDER,))[0]["divergence"] == pytest.approx(
        expected, rel=LIMIT
    )


def with_words(batch, scores, how: Distill, top_k: int):
    """What a teacher leaves: the likeliest words in any order, and their log-probabilities."""
    logs = log_softmax(scores / how.temperature)
    words = np.argsort(-logs, axis=-1)[..., :top_k].astype(np.int32)
    words = np.random.default_rng(0).permuted(words, axis=-1)
    found = np.take_along_axis(logs, words, -1).astype(np.float32)
    return batch | {"teacher_words": words, "teacher_logs": found}


def distance(found, expected) -> float:
    """Of gradients, relative to the length of the expected ones."""
    apart = sum(((found[path] - leaf) ** 2).sum() for path, leaf in expected.items())
    return float(np.sqrt(apart / sum((leaf**2).sum() for leaf in expected.values())))


@pytest.mark.parametrize(
    ("how", "images"),
    [*((how, False) for how in WAYS), (WAYS[2], True)],
    ids=lambda each: "vision" * each if isinstance(each, bool) else each.divergence,
)
def test_all_words_that_a_teacher_left_give_the_same_gradients(how, images):
    student, teacher = (MODEL, WIDER_SEEING) if images else (TEXT, WIDER)
    batch = weighted(rows(4, images=images))
    online = computed(asking(how, teacher), student, batch, (teacher,))
    left = with_words(batch, logits_of(teacher, batch, 1), how, how.top_k)
    offline = computed(how, student, left)
    assert distance(offline[1], online[1]) < LIMIT
    assert offline[0]["loss"] == pytest.approx(online[0]["loss"], rel=LIMIT)
    assert offline[0]["teacher_mass"] == pytest.approx(offline[0]["weight"], rel=LIMIT)


def test_gradients_come_closer_the_more_words_were_left():
    """The numbers are those of docs/distillation.md: a random teacher's words are much alike."""
    batch = weighted(rows(4, images=False))
    _, exact = computed(asking(WAYS[0], WIDER), TEXT, batch, (WIDER,))
    scores, apart, masses = logits_of(WIDER, batch, 1), [], []
    for top_k in (8, 64, 256, 500):
        how = Distill(top_k=top_k)
        sums, grads = computed(how, TEXT, with_words(batch, scores, how, top_k))
        apart.append(distance(grads, exact))
        masses.append(sums["teacher_mass"] / sums["weight"])
    assert masses == pytest.approx([0.087, 0.362, 0.788, 0.997], abs=1e-3)
    assert apart == pytest.approx([0.845, 0.529, 0.184, 0.005], abs=1e-3)


@pytest.mark.parametrize("online", [True, False], ids=["asked", "left"])
def test_on_a_mesh_and_by_chunks_gradients_are_the_same(online, monkeypatch):
    batch = weighted(rows(8, images=True))
    how, teachers = Distill(top_k=32, divergence="jsd", share=0.7), ()
    if online:
        how, teachers = asking(how, WIDER_SEEING), (WIDER_SEEING,)
    else:
        batch = with_words(batch, logits_of(WIDER_SEEING, batch, 1), how, 32)
    expected = computed(how, MODEL, batch, teachers)
    monkeypatch.setattr(chunks, "MAX_LOGITS", 5 * VOCABULARY)
    found = computed(how, MODEL, batch, teachers, make_mesh(MESH))
    assert distance(found[1], expected[1]) < LIMIT
    assert found[0] == pytest.approx(expected[0], rel=LIMIT)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    batch = rows(4, images=False)
    how = asking(WAYS[0], TEXT)

    def loss(params, batch):
        model = bind(TEXT, params)
        teacher = jax.tree.map(jax.lax.stop_gradient, bind(TEXT, params))
        return distill(model, batch, jax.random.key(0), how=how, teachers=[teacher])[0]

    with jax.set_mesh(ONE):
        value, grads = jax.jit(jax.value_and_grad(loss))(random_params(TEXT), place(batch, ONE))
    assert abs(float(value)) < 1e-3
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-4


def test_a_temperature_of_a_mixture_is_that_of_each_teacher():
    """Two equal teachers are one."""
    batch = rows(2, images=False)
    how = Distill(top_k=1, temperature=3.0)
    one = computed(asking(how, WIDER), TEXT, batch, (WIDER,))[0]["divergence"]

    def twice(params, taught, batch):
        models = [bind(WIDER, taught)] * 2
        model = bind(TEXT, params)
        run = partial(distill, how=asking(how, WIDER, WIDER), teachers=models)
        return run(model, batch, jax.random.key(0))[1]["divergence"]

    with jax.set_mesh(ONE):
        both = jax.jit(twice)(random_params(TEXT), random_params(WIDER, seed=1), place(batch, ONE))
    assert float(both) == pytest.approx(one, rel=LIMIT)
