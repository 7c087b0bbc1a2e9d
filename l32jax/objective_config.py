"""What a stage minimises, as frozen dataclasses; `kind` tells them apart, in files too."""

import dataclasses
import math
from typing import Literal

from l32jax.config import LlamaConfig, VisionConfig, require_positive
from l32jax.errors import InputError

# The model that a policy is held against: a copy of where the stage starts; a running average of
# the policy (as Llama 3.2 Vision's was); log-probabilities that `l32jax data score` left in the
# data.
Reference = Literal["start", "ema", "data"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy of the weighted targets: pretraining, and tuning on answers (SFT)."""

    kind: Literal["next_token"] = "next_token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model whose distributions are targets; frozen, and sharded as the student is.

    weight: of its probabilities in the mixture of all teachers'.
    """

    model: LlamaConfig
    start_from: str
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise InputError(
                f"weight={self.weight} of teacher {self.start_from!r}: give a number above 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """A teacher's distributions as token-level targets, beside the tokens themselves.

    teachers: asked in every step; none if `l32jax data score` has left their likeliest words in
      the data.
    top_k: how many those are. What is left of the probability is one word more.
    divergence: KL(teacher, student); KL(student, teacher); or of both to their mixture, in which
      the teacher's share is `beta` (GKD, arXiv 2306.13649, equation 1).
    temperature: of both distributions; the divergence counts its square times (Hinton et al.,
      arXiv 1503.02531, section 2).
    share: of the divergence in the loss; the rest is the cross-entropy.
    """

    kind: Literal["distill"] = "distill"
    teachers: tuple[Teacher, ...] = ()
    top_k: int = 0
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    share: float = 1.0

    def __post_init__(self):
        if bool(self.teachers) == bool(self.top_k):
            raise InputError(
                f"{len(self.teachers)} teachers and top_k={self.top_k} of a distillation: give "
                "teachers to ask, or how many words of theirs the data has"
            )
        shares = 0 < self.beta < 1 and 0 <= self.share <= 1
        if not (shares and 0 < self.temperature < math.inf):
            raise InputError(
                f"beta={self.beta}, share={self.share}, temperature={self.temperature} of a "
                "distillation: shares lie between 0 and 1; a temperature is a number above 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo:
    """Preferences of answers over others (arXiv 2305.18290), as Llama 3 has it: sections 4.1.4.

    loss: "sigmoid" is DPO's; "ipo" is the squared distance to 1 / (2 beta) (arXiv 2310.12036,
      equation 17).
    length_normalised: log-probabilities are means over an answer's tokens instead of sums.
    mask_format: tokens that end turns, and other special ones, do not count in either answer.
    nll: weight of the mean negative log-likelihood of the better answer's tokens.
    ema_decay, refresh_every: a reference "ema" moves so far towards the policy every so many steps.
    """

    kind: Literal["dpo"] = "dpo"
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = 0.1
    length_normalised: bool = False
    mask_format: bool = True
    nll: float = 0.2
    reference: Reference = "start"
    ema_decay: float = 0.99
    refresh_every: int = 1

    def __post_init__(self):
        require_positive(self, "refresh_every")
        weights = 0 < self.beta < math.inf and 0 <= self.nll < math.inf
        if not (weights and 0 <= self.ema_decay < 1):
            raise InputError(
                f"beta={self.beta}, nll={self.nll}, ema_decay={self.ema_decay} of DPO: beta is "
                "a number above 0, nll one not below, and ema_decay a share below 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """Rewards that rank answers: -log sigmoid(better - worse - margin), Llama 2, section 3.2.2.

    margin: times that of each comparison in the data; Llama 3 has none.
    l2: weight of the squared rewards (the vision models', Llama 3, section 7.5.3).
    """

    kind: Literal["reward"] = "reward"
    margin: float = 0.0
    l2: float = 0.0

    def __post_init__(self):
        if not (0 <= self.margin < math.inf and 0 <= self.l2 < math.inf):
            raise InputError(f"margin={self.margin}, l2={self.l2} of rewards: give none below 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Policy gradients of a verifier's rewards, relative to those of a prompt's other answers.

    arXiv 2402.03300, section 4.1. A prompt whose answers are all alike teaches nothing.

    answers: to each prompt. prompts: asked at a time.
    epochs: how often the answers are learned from before others are sampled.
    clip: how far a token's probability may leave its old one, as a ratio's distance from 1.
    kl: weight of the divergence from the reference; 0 for none.
    verifier: a name of `align.verifiers`, or package.module:function.
    max_new_tokens, temperature: of the answers.
    """

    kind: Literal["grpo"] = "grpo"
    answers: int = 8
    prompts: int = 16
    epochs: int = 1
    clip: float = 0.2
    kl: float = 0.0
    reference: Literal["start", "ema"] = "start"
    ema_decay: float = 0.99
    refresh_every: int = 1
    verifier: str = "exact"
    max_new_tokens: int = 128
    temperature: float = 1.0

    def __post_init__(self):
        require_positive(self, "prompts", "epochs", "max_new_tokens", "refresh_every")
        if self.answers < 2:
            raise InputError(f"answers={self.answers} of GRPO: they are compared; give 2 at least")
        shares = 0 < self.clip < 1 and 0 <= self.ema_decay < 1
        if not (shares and 0 <= self.kl < math.inf and 0 < self.temperature < math.inf):
            raise InputError(
                f"clip={self.clip}, ema_decay={self.ema_decay}, kl={self.kl}, "
                f"temperature={self.temperature} of GRPO: shares lie between 0 and 1; kl is a "
                "number not below 0, a temperature one above it"
            )


Objective = NextToken | Distill | Dpo | Reward | Grpo


def teachers_of(objective: Objective) -> tuple[Teacher, ...]:
    """Those that are asked in every step."""
    return objective.teachers if isinstance(objective, Distill) else ()


def reads_targets(objective: Objective) -> bool:
    """Whether it learns from what `l32jax data score` has left in the data."""
    if isinstance(objective, Distill):
        return bool(objective.top_k)
    return isinstance(objective, Dpo) and objective.reference == "data"


def keeps_reference(objective: Objective) -> bool:
    """Whether a stage's state has a reference model of its own."""
    if isinstance(objective, Grpo):
        return objective.kl > 0
    return isinstance(objective, Dpo) and objective.reference != "data"


def models_beside(objective: Objective, policy: LlamaConfig) -> dict[str, tuple[LlamaConfig, ...]]:
    """Whose forward passes a step has beside that of the model that trains, by what they are."""
    teachers = tuple(teacher.model for teacher in teachers_of(objective))
    reference = (policy,) if keeps_reference(objective) else ()
    found = {"teachers": teachers, "reference": reference}
    return {name: models for name, models in found.items() if models}


def compares(objective: Objective) -> bool:
    """Whether it learns from comparisons of answers."""
    return isinstance(objective, Dpo | Reward)


def require_readable(teacher: Teacher, student: LlamaConfig, stage: str, *, seeing: bool) -> None:
    """InputError unless a teacher can read its student's rows, with images if `seeing`."""
    words, known = student.decoder.vocab_size, teacher.model.decoder.vocab_size
    vision, why = teacher.model.vision, None
    if known != words:
        why = f"it knows {known} words, and the model {words}; take one of the same family"
    elif seeing and vision is None:
        why = "it reads text only, and rows have images; take one that sees, or set max_images=0"
    elif seeing and student.vision and vision and tiles_of(vision) != tiles_of(student.vision):
        why = "its tiles are of another size or number than the model's; take one of the same"
    if why:
        raise InputError(f"teacher {teacher.start_from!r} of stage {stage!r}: {why}")


def tiles_of(vision: VisionConfig) -> tuple[int, int]:
    """How large and how many they are; models in which both are the same read the same rows."""
    return vision.image_size, vision.max_tiles
