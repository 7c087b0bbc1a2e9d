"""How fast steps are, from when they end and what was in them."""

from collections import deque
from collections.abc import Iterable

import numpy as np

from l32jax.config import LlamaConfig
from l32jax.run_config import StageConfig
from l32jax.train.flops import Counts, Flops, flops_beside, peak, step_flops

RECENT = 200  # steps that percentiles are of


class Speed:
    """Of the steps since `take`, and of recent ones.

    Args:
      model, stage: whose steps they are.
      num_devices, device_kind: on which they run.
    """

    def __init__(self, model: LlamaConfig, stage: StageConfig, num_devices: int, device_kind: str):
        self._model, self._stage = model, stage
        self._num_devices, self._peak = num_devices, peak(device_kind)
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._clear()

    def _clear(self) -> None:
        self._steps, self._seconds, self._waited, self._counts = 0, 0.0, 0.0, Counts()

    def add(self, seconds: float, waited: float, counts: Counts) -> None:
        """A step, from the end of the one before to its own; of which data was waited for."""
        self._recent.append(seconds)
        self._steps += 1
        self._seconds += seconds
        self._waited += min(waited, seconds)  # it may have begun before the step
        self._counts += counts

    @property
    def step_seconds(self) -> float:
        """The median of recent steps; 0 before there is one."""
        return float(np.median(self._recent)) if self._recent else 0.0

    def take(self) -> dict[str, float]:
        """Numbers by name of the steps since the last time; none, if there were none."""
        if not self._steps or not self._seconds:
            return {}
        seconds, counts = self._seconds, self._counts
        flops = stage_flops(self._model, self._stage, counts)
        per_device = seconds * self._num_devices
        p50, p95 = np.percentile(self._recent, (50, 95))
        found = {
            "perf/tokens_per_s": counts.tokens / seconds,
            "perf/images_per_s": counts.images / seconds,
            "perf/step_s": seconds / self._steps,
            "perf/step_s_p50": float(p50),
            "perf/step_s_p95": float(p95),
            "perf/tflops_per_s": flops.useful / per_device / 1e12,
            "perf/tflops_done_per_s": flops.done / per_device / 1e12,
            "data/wait": self._waited / seconds,
            **{f"data/padding_{side}": share for side, share in counts.padding().items()},
        }
        if self._peak is not None:
            found["perf/mfu"] = flops.useful / per_device / self._peak
        self._clear()
        return found


def total(parts: Iterable[Flops]) -> Flops:
    return sum(parts, Flops(0, 0))


def full_step(model: LlamaConfig, stage: StageConfig) -> int:
    """Operations of a step whose rows are full: how much longer another stage's steps will be."""
    data = stage.data
    slots, images = data.batch_size * data.length, data.batch_size * data.max_images
    counts = Counts(slots=slots, image_slots=images, tile_slots=images * data.max_tiles)
    return stage_flops(model, stage, counts).done


def stage_flops(model: LlamaConfig, stage: StageConfig, counts: Counts) -> Flops:
    """Of steps over what was counted; features that are kept are not computed in them."""
    found = step_flops(model, stage.trains, counts)
    if stage.data.features is not None:
        found.pop("vision_tower", None)
    beside = flops_beside(stage.objective, model, counts)
    return total([*found.values(), *beside.values()])
