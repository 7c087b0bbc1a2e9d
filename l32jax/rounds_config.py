"""Rounds of post-training: what each samples, and what it learns from that, as a dataclass."""

import dataclasses

from l32jax.config import SamplingConfig, require_positive
from l32jax.errors import InputError
from l32jax.objective_config import compares
from l32jax.run_config import StageConfig, TrainConfig

# In mixtures of a round's stages: the best answers of the round, and the best beside the worst.
BEST, PAIRS = "best", "pairs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Each round draws answers from the model of the one before, scores them, and learns from them.

    Llama 3, section 4: six rounds of a reward model, rejection sampling, SFT and DPO.

    run: the stages of a round, SFT and then DPO; its `start_from` is where the first round starts,
      its `directory` that of all rounds. "best" and "pairs" in a mixture are what the round has
      sampled; other sources may stand beside them.
    prompts: a source for each round, from the first again if there are fewer: dialogs that end
      with the true answer.
    held_out: the source that accuracy is measured on, greedily.
    rounds: how many.
    verifier: what says whether answers are right; a name of `align.verifiers`.
    answers: to each prompt. rows: drawn at a time.
    sampling: how they are drawn; a round has its own seed.
    reward: the stage that makes a reward model of all pairs so far. It starts where the round does,
      and ranks right answers in the next round. None for no reward model.
    """

    run: TrainConfig
    prompts: tuple[str, ...]
    held_out: str
    rounds: int = 3
    verifier: str = "exact"
    answers: int = 8
    rows: int = 128
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    reward: StageConfig | None = None

    def __post_init__(self):
        require_positive(self, "rounds", "rows")
        if self.answers < 2 or self.sampling.temperature == 0:
            raise InputError(
                f"answers={self.answers} at temperature {self.sampling.temperature} of rounds: "
                "they are compared; give 2 at least, and a temperature above 0"
            )
        if not self.prompts or self.run.start_from is None:
            raise InputError("rounds without prompts or start_from: give both")
        if self.reward is not None and not compares(self.reward.objective):
            raise InputError(
                f"reward={self.reward.name!r} of rounds: its objective is "
                f"{self.reward.objective.kind!r}; let it be reward"
            )
