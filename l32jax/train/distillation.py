"""Distributions of teachers as targets: asked for in the step, or left in the data before."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from l32jax.model.llama import Batch, Llama, forward_batch
from l32jax.objective_config import Distill
from l32jax.sharding import ACTIVATION_AXES, activation_spec
from l32jax.train.chunks import over_places
from l32jax.train.objectives import Metrics, cross_entropy

Places = dict[str, Float[Array, "b t"]]
LEAST = 1e-6  # of the probability that all words but the likeliest are given


def distill(
    model: Llama,
    batch: Batch,
    rng: Key[Array, ""],
    *,
    how: Distill,
    teachers: Sequence[Llama] = (),
    **options: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """The divergence between teacher and student at the weighted targets, and the cross-entropy.

    Scores of all words exist for a chunk of places at a time, the teachers' too. Without teachers
    the batch has their likeliest words: "teacher_words" and their "teacher_logs" [b t w].

    Args:
      teachers: as many as `how` has, or none.
      options: those of `llama.forward`: dtype, saved, attention.
    Returns:
      The sum to minimise, and the sums "loss", "divergence", "cross_entropy", "accuracy" and
      "weight"; of likeliest words also "teacher_mass", the probability that they have together.
    """
    del rng  # nothing is drawn
    models = (model, *teachers)
    states = [forward_batch(each, batch, **options).states for each in models]
    states[1:] = map(jax.lax.stop_gradient, states[1:])
    heads = [partial(each.decoder.logits, table=each.decoder.scoring_table()) for each in models]
    told = {} if teachers else {name: batch[name] for name in ("teacher_words", "teacher_logs")}
    num_words = model.decoder.config.decoder.vocab_size
    found = over_places(
        partial(_score, how, heads), (states, batch["targets"], told), num_words * len(models)
    )
    sums = {name: jnp.sum(each * batch["weights"]) for name, each in found.items()}
    sums["loss"] = (
        how.share * how.temperature**2 * sums["divergence"]
        + (1 - how.share) * sums["cross_entropy"]
    )
    return sums["loss"], sums | {"weight": jnp.sum(batch["weights"])}


def _score(
    how: Distill,
    heads: Sequence[Any],
    states: Sequence[Float[Array, "b t _"]],
    targets: Int[Array, "b t"],
    told: dict[str, Array],
) -> Places:
    own, *others = (head(each) for head, each in zip(heads, states, strict=True))
    log_q = jax.nn.log_softmax(own / how.temperature, axis=-1)
    found = {
        "cross_entropy": cross_entropy(own, targets),
        "accuracy": (own.argmax(axis=-1) == targets).astype(jnp.float32),
    }
    if others:
        log_p = _mixed([each / how.temperature for each in others], how)
    else:
        log_p, words = told["teacher_logs"], told["teacher_words"]
        found["teacher_mass"] = jnp.exp(log_p).sum(axis=-1)
        whole = words.shape[-1] == log_q.shape[-1]
        log_q = _picked(log_q, words)
        if not whole:
            log_p, log_q = _with_rest(log_p), _with_rest(log_q)
    return found | {"divergence": divergence(log_p, log_q, how)}


def _mixed(scores: Sequence[Float[Array, "b t v"]], how: Distill) -> Float[Array, "b t v"]:
    """Log-probabilities of the teachers' mixture."""
    total = sum(teacher.weight for teacher in how.teachers)
    logs = [
        jax.nn.log_softmax(each, axis=-1) + jnp.log(teacher.weight / total)
        for each, teacher in zip(scores, how.teachers, strict=True)
    ]
    mixed = logs[0]
    for each in logs[1:]:
        mixed = jnp.logaddexp(mixed, each)
    return mixed


def divergence(
    log_p: Float[Array, "*place w"], log_q: Float[Array, "*place w"], how: Distill
) -> Float[Array, "*place"]:
    """Between a teacher's distribution p and a student's q, in nats."""
    if how.divergence == "forward_kl":
        return _kl(log_p, log_q)
    if how.divergence == "reverse_kl":
        return _kl(log_q, log_p)
    middle = jnp.logaddexp(log_p + jnp.log(how.beta), log_q + jnp.log(1 - how.beta))
    return how.beta * _kl(log_p, middle) + (1 - how.beta) * _kl(log_q, middle)


def _kl(log_p: Array, log_q: Array) -> Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _with_rest(logs: Float[Array, "b t w"]) -> Float[Array, "b t more"]:
    """With the log-probability of all other words together, as of one word more."""
    rest = jnp.log(jnp.maximum(1 - jnp.exp(logs).sum(axis=-1, keepdims=True), LEAST))
    return jnp.concatenate([logs, rest], axis=-1)


def _picked(logs: Float[Array, "b t v"], words: Int[Array, "b t w"]) -> Float[Array, "b t w"]:
    """logs[b, t, words[b, t]]; devices that share the vocabulary each pick what they hold."""
    axis, rows = ACTIVATION_AXES["v"], activation_spec("bt")

    def pick(logs, words):
        words = words - jax.lax.axis_index(axis) * logs.shape[-1]
        held = (words >= 0) & (words < logs.shape[-1])
        found = jnp.take_along_axis(logs, jnp.where(held, words, 0), axis=-1)
        return jax.lax.psum(jnp.where(held, found, 0), axis)

    run = jax.shard_map(pick, in_specs=(activation_spec("btv"), rows), out_specs=rows)
    return run(logs, words)


class Left(NamedTuple):
    """What teachers say of every place's target, to be learned from later.

    Attributes:
      reference: its log-probability, in nats, at temperature 1.
      words, logs: the likeliest words in its place, and their log-probabilities.
    """

    reference: Float[Array, "b t"] | Float[np.ndarray, "b t"]
    words: Int[Array, "b t w"] | Int[np.ndarray, "b t w"]
    logs: Float[Array, "b t w"] | Float[np.ndarray, "b t w"]


def leave(
    teachers: Sequence[Llama], batch: Batch, *, how: Distill, top_k: int, **options: Any
) -> Left:
    """What the mixture of the teachers says, with `how.temperature` of `top_k` words."""
    states = [forward_batch(each, batch, **options).states for each in teachers]
    heads = [partial(each.decoder.logits, table=each.decoder.scoring_table()) for each in teachers]

    def score(states: Sequence[Array], targets: Array) -> Left:
        scores = [head(each) for head, each in zip(heads, states, strict=True)]
        reference = -cross_entropy(_mixed(scores, how), targets)
        logs = _mixed([each / how.temperature for each in scores], how)
        whole = jax.sharding.reshard(logs, activation_spec("bt"))  # of all words in one place
        logs, words = jax.lax.top_k(whole, top_k)
        return Left(reference, words, logs)

    num_words = teachers[0].decoder.config.decoder.vocab_size
    return over_places(score, (states, batch["targets"]), num_words * len(teachers))
