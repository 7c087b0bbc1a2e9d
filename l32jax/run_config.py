"""What a run does: its stages, what each of them reads and learns, as frozen dataclasses."""

import dataclasses
from typing import Literal

from l32jax.config import (
    AttentionConfig,
    LlamaConfig,
    MeshConfig,
    Part,
    Stored,
    require_positive,
)
from l32jax.errors import InputError
from l32jax.objective_config import (
    NextToken,
    Objective,
    compares,
    reads_targets,
    require_readable,
    teachers_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """A warm-up to `peak_lr` and a decay to `final_lr`; gradients clipped by norm.

    kind: "adafactor" keeps of the second moments of a matrix those of its rows and columns;
      "muon" makes the momentum of matrices orthogonal, and is AdamW for the rest. Their rates are
      of AdamW's size.
    momentum: the dtype in which first moments are kept; "adafactor" has none with beta1=0.
    gate_rate: what a gate's step is multiplied by. A gate is one number: at the rate of the
      matrices behind it, which have thousands to move, it stays nearly shut in a short run.
    """

    peak_lr: float
    kind: Literal["adamw", "adafactor", "muon"] = "adamw"
    final_lr: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: Literal["float32", "bfloat16"] = "float32"
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    gate_rate: float = 1.0

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be below 1, and not negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a stage reads: a mixture of named sources, laid out in rows of fixed shape.

    mixture: (source, share of samples); see `data.sources` for the names.
    length: text tokens of a row.
    max_images: images of a row; 0 for text only.
    max_tiles: tiles of an image.
    vision_tiles: tiles on the vision axis of a row, which its images share; 0 for as many as they
      could have at most.
    mirror_images: left and right swapped in half of the images, where answers allow it.
    packing: which samples share a row: the row with the least room that is enough takes the next
      one, the first such row does, or none shares ("none").
    packing_rows: rows of a stream that are open at once, about; more leave less room unused.
    max_bad: share of the records that may be unusable; above it the run fails.
    workers: processes beside each that trains, which make its rows; 0 for a thread of its own.
    max_pairs: comparisons of two answers that a row holds, of a stage that learns from them.
    features: a folder for what a frozen image encoder makes of each image, which is then computed
      once; it becomes large. None to encode images in every step.
    """

    mixture: tuple[tuple[str, float], ...]
    batch_size: int
    length: int
    max_images: int = 0
    max_tiles: int = 4
    vision_tiles: int = 0
    mirror_images: bool = False
    packing: Literal["best_fit", "first_fit", "none"] = "best_fit"
    packing_rows: int = 32
    max_bad: float = 0.01
    workers: int = 0
    max_pairs: int = 0
    features: str | None = None

    def __post_init__(self):
        require_positive(self, "batch_size", "length", "max_tiles", "packing_rows")
        if self.vision_tiles and not self.max_tiles <= self.vision_tiles:
            raise InputError(
                f"vision_tiles={self.vision_tiles} of a row: one image alone may have max_tiles="
                f"{self.max_tiles}; raise it"
            )
        if not 0 <= self.max_bad <= 1:
            raise InputError(f"max_bad={self.max_bad} is a share: it lies between 0 and 1")
        if self.features is not None and (why := self._why_no_features(self.features)):
            raise InputError(f"features={self.features!r} in the data: {why}")

    def _why_no_features(self, folder: str) -> str | None:
        if not folder or "://" in folder:
            return "it must be a folder that all processes see"
        if not self.max_images:
            return "max_images=0 leaves no images; leave it out"
        if self.mirror_images:
            return "mirror_images makes other images of them in time; leave one of the two out"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadSteps:
    """What becomes of a step whose loss or gradient is not finite, or is a spike.

    then: "stop" ends the run, with what was saved before; "skip" leaves the step's update out;
      "rollback" goes back to the last checkpoint, and past the data up to the bad batch.
    spike: a loss, or norm of the gradient, so many times above the median of the last 64 good
      steps; 0 for none.
    beyond: batches after the bad one that a rollback leaves out too.
    limit: the run ends after more skips in a row, or more rollbacks in a stage.
    """

    then: Literal["stop", "skip", "rollback"] = "stop"
    spike: float = 0.0
    beyond: int = 0
    limit: int = 10

    def __post_init__(self):
        require_positive(self, "limit")
        if self.spike and self.spike <= 1:
            raise InputError(f"spike={self.spike} of bad steps: usual is 1; give more, or 0")
        if self.beyond < 0:
            raise InputError(f"beyond={self.beyond} of bad steps must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Part of a run: which parameters learn, from what, for how long.

    objective: what is minimised; see `objective_config`.
    accumulate: microbatches whose gradients add up to a step's; they share its rows.
    z_loss: weight of the mean squared logarithm of the softmax's denominator.
    image_size: of tiles from this stage on; None leaves it as it is.
    average: what the stage results in: its last parameters; an exponential average ("ema"), in
      which a sample replaces 1 - `ema_decay`; the mean of the samples ("polyak").
    average_from, average_every: samples are taken in what of the stage is left after this share of
      it, so many steps apart, and at its end.
    """

    name: str
    num_steps: int
    trains: tuple[Part, ...]
    data: DataConfig
    optimizer: OptimizerConfig
    objective: Objective = NextToken()
    accumulate: int = 1
    z_loss: float = 0.0
    image_size: int | None = None
    average: Literal["none", "ema", "polyak"] = "none"
    ema_decay: float = 0.999
    average_from: float = 0.8
    average_every: int = 1
    bad_steps: BadSteps = BadSteps()

    def __post_init__(self):
        require_positive(self, "num_steps", "accumulate", "average_every")
        if self.data.batch_size % self.accumulate:
            raise InputError(
                f"accumulate={self.accumulate} of stage {self.name!r}: batch_size="
                f"{self.data.batch_size} must be a multiple of it, as microbatches are alike"
            )
        if self.data.features is not None and "vision_tower" in self.trains:
            raise InputError(
                f"features={self.data.features!r} of stage {self.name!r}: it trains vision_tower, "
                "which changes them; leave one of the two out"
            )
        if self.data.features is not None and teachers_of(self.objective):
            raise InputError(
                f"features={self.data.features!r} of stage {self.name!r}: teachers see images by "
                "their own encoders; leave one of the two out"
            )
        if self.data.mirror_images and reads_targets(self.objective):
            raise InputError(
                f"mirror_images of stage {self.name!r}: what models left in its data is of the "
                "images as they were; leave it out"
            )
        if compares(self.objective) and not self.data.max_pairs:
            raise InputError(
                f"max_pairs=0 of stage {self.name!r}: its objective {self.objective.kind!r} learns "
                "from comparisons; say first how many a row holds"
            )
        if self.z_loss and not isinstance(self.objective, NextToken):
            raise InputError(
                f"z_loss={self.z_loss} of stage {self.name!r}: its objective is "
                f"{self.objective.kind!r}, which has none; leave it out"
            )
        if self.z_loss < 0:
            raise InputError(f"z_loss={self.z_loss} of stage {self.name!r} must not be negative")
        for name in ("ema_decay", "average_from"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"{name}={getattr(self, name)} of stage {self.name!r} must be a share below 1"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run: stages in order, each starting from the parameters of the one before.

    start_from: a checkpoint or preset whose parameters the first stage starts from; None for
      random ones.
    tokenizer: a file or folder; None for the tokenizer that stands beside `start_from`.
    mesh: None for that of `presets.mesh_for`, by the model's size and the devices.
    dtype: of activations.
    params: of parameters that are frozen; with "int8" and "int4" their projections are quantised,
      and the rest is bfloat16. Those that train are float32; but with "float32", the model sees
      their matrices in `dtype`, once a step.
    trunk_from: a text model's checkpoint or preset, whose weights take the place of the language
      model's in those of `start_from`; as its instruct model's do before instruction tuning.
    attention: how attention is computed.
    saved: what the backward pass finds saved and need not compute again: everything; the results
      of matrix products and of attention; those of attention; nothing.
    offload: what waits in the host's memory between its uses: the optimizer's state, or nothing.
    show_every: steps between looks inside, with examples; each costs a forward pass.
    hung_after: seconds in which no step ends, and also ten times as long as steps take, after which
      the process ends to be started again; 0 for never.
    """

    model: LlamaConfig
    stages: tuple[StageConfig, ...]
    directory: str
    tokenizer: str | None = None
    start_from: str | None = None
    trunk_from: str | None = None
    mesh: MeshConfig | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    params: Stored = "float32"
    attention: AttentionConfig = AttentionConfig()
    saved: Literal["everything", "dots", "attention", "nothing"] = "everything"
    offload: Literal["none", "optimizer"] = "none"
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    show_every: int = 200
    hung_after: float = 600.0

    def __post_init__(self):
        require_positive(self, "save_every", "keep", "log_every", "show_every")
        if self.trunk_from is not None and self.start_from is None:
            raise InputError(
                f"trunk_from={self.trunk_from!r} without start_from, of which it replaces a part; "
                "to start from it alone, give it as start_from"
            )
        for number, stage in enumerate(self.stages):
            if stage.image_size is not None and self.model.vision is None:
                raise InputError(
                    f"image_size={stage.image_size} of stage {stage.name!r}: the model has no "
                    "image encoder; leave it out"
                )
            if stage.data.features is not None and self.model.compat.row_mask == "hf":
                raise InputError(
                    f"features={stage.data.features!r} of stage {stage.name!r}: row_mask='hf' "
                    "attends to unused tiles, which have none; leave one of the two out"
                )
            if "lora" in stage.trains and not self.model.loras:
                raise InputError(
                    f"trains={stage.trains} of stage {stage.name!r}: the model has no lora; give "
                    "its decoder one, as model.decoder.lora.rank=16 does"
                )
            if stage.data.features is not None and "lora" in stage.trains and self._adapts_encoder:
                raise InputError(
                    f"features={stage.data.features!r} of stage {stage.name!r}: it trains lora of "
                    "the image encoder, which changes them; leave one of the two out"
                )
            student = self.model_of(number)  # its own checks are those of the size
            for teacher in teachers_of(stage.objective):
                require_readable(teacher, student, stage.name, seeing=stage.data.max_images > 0)

    @property
    def _adapts_encoder(self) -> bool:
        return self.model.vision is not None and self.model.vision.lora is not None

    def model_of(self, number: int) -> LlamaConfig:
        """What the weights are at the end of a stage: image sizes stay until the next one."""
        told = (stage.image_size for stage in self.stages[: number + 1])
        sizes = [size for size in told if size is not None]
        if not sizes or self.model.vision is None:
            return self.model
        vision = dataclasses.replace(self.model.vision, image_size=sizes[-1])
        return dataclasses.replace(self.model, vision=vision)
