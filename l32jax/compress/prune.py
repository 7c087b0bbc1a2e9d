"""A smaller model out of a larger one, in one shot: parts are left out, the rest is mended.

Meta made 1B and 3B from 8B by "systematically removing parts of the network and adjusting the
magnitude of the weights"; by which criterion is not public. Here layers go by how little they turn
the stream (ShortGPT, arXiv 2403.03853), and widths by activations on a calibration set (Minitron,
arXiv 2407.14679), weighed by the weights that they meet (Wanda, arXiv 2306.11695). What is left
takes over what was left out, by least squares. To be followed by training: distillation.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from l32jax.checkpoint.engine.transfer import SILENT, Progress
from l32jax.compress.attention import drop_heads, shorten_heads
from l32jax.compress.calibration import Calibration, Subject
from l32jax.compress.depth import drop_groups
from l32jax.compress.mlp import narrow_mlps
from l32jax.compress.target import Choice, require_reachable, turning
from l32jax.compress.tie import tie
from l32jax.compress.width import narrow_stream
from l32jax.config import DecoderConfig, LlamaConfig
from l32jax.model.llama import Batch
from l32jax.model.parameters import Params, count
from l32jax.sharding import require_divisible

Cut = Callable[[Subject, Calibration, DecoderConfig], tuple[Subject, Choice]]


class Part(NamedTuple):
    """`sizes` are the fields of DecoderConfig that the cut makes those of the target."""

    name: str
    sizes: tuple[str, ...]
    cut: Cut


PARTS = (
    Part("depth", ("num_groups",), lambda s, c, to: drop_groups(s, c, to.num_groups)),
    Part(
        "heads",
        ("num_heads", "num_kv_heads"),
        lambda s, c, to: drop_heads(s, c, to.num_heads, to.num_kv_heads),
    ),
    Part("head dims", ("head_dim",), lambda s, c, to: shorten_heads(s, c, to.head_dim)),
    Part("FFN", ("mlp_dim",), lambda s, c, to: narrow_mlps(s, c, to.mlp_dim)),
    Part("embedding", ("embed_dim",), lambda s, c, to: narrow_stream(s, c, to.embed_dim)),
    Part("tie", ("tied_embedding",), lambda s, c, to: tie(s, c)),
)


class Step(NamedTuple):
    """What came of a part: the model's size, and its perplexity on held-out batches."""

    name: str
    chosen: Choice
    parameters: int
    perplexity: float


class Pruned(NamedTuple):
    config: LlamaConfig
    params: Params
    steps: tuple[Step, ...]


def prune(
    config: LlamaConfig,
    params: Params,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    target: LlamaConfig,
    *,
    progress: Progress = SILENT,
) -> Pruned:
    """A model of the target's sizes, on the mesh that is set.

    Needs room for the parameters twice on the devices, and for the calibration set's residual
    stream; algebra is done on the host, in one process, with the largest parameter at a time.

    Args:
      calibration, held_out: batches on the mesh; perplexities are of the latter.
    Raises:
      InputError: the target is not the model with less of something.
    """
    require_reachable(config, target)
    require_divisible(target, "the target", jax.sharding.get_abstract_mesh().shape)
    subject = Subject(config, params)

    def step(name: str, chosen: Choice) -> Step:
        loss = Calibration(held_out, progress, name).loss(subject)
        return Step(name, chosen, count(subject.params), math.exp(loss))

    steps = [step("whole", {})]
    subject = Subject(turning(config, target), params)
    for part in PARTS:
        sizes = (
            [getattr(each.decoder, size) for size in part.sizes]
            for each in (subject.config, target)
        )
        if len(set(map(tuple, sizes))) > 1:
            measured = Calibration(calibration, progress, part.name)
            subject, chosen = part.cut(subject, measured, target.decoder)
            steps.append(step(part.name, chosen))
    assert subject.config == target
    return Pruned(*subject, tuple(steps))
