"""Every knob, as frozen dataclasses: what is not here cannot be changed from outside."""

import dataclasses
import math
from typing import Literal

from l32jax.errors import InputError

BlockKind = Literal["self", "cross"]
Behaviour = Literal["meta", "hf"]
MAX_PATTERN = 40  # all of 11B, were it irregular: two seconds to trace; 256 take two minutes
Part = Literal["language_model", "vision_tower", "adapter", "lora", "reward_head"]
Stored = Literal["float32", "bfloat16", "int8", "int4"]  # frozen parameters; see `model.quantise`
Target = Literal["query", "key", "value", "out", "gate", "up", "down"]


def require_positive(config: object, *names: str) -> None:
    """InputError unless these fields are 1 or more."""
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent interpolation of rotary embeddings."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank beside projections (Hu et al., 2021): W + alpha / rank * B @ A.

    targets: names of projections, in every block that has one of that name.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[Target, ...] = ("query", "key", "value", "out", "gate", "up", "down")

    def __post_init__(self):
        require_positive(self, "rank")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"alpha={self.alpha} must be a positive number")
        if not self.targets:
            raise InputError("targets=() must name a projection at least")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A stack of `num_groups` identical groups, each made of the blocks in `group_pattern`.

    Text models repeat one self-attention block; vision models repeat five blocks of which the
    fourth attends to images. One scan runs either, and compiles one group.
    """

    vocab_size: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    num_groups: int
    group_pattern: tuple[BlockKind, ...] = ("self",)
    tied_embedding: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    max_context: int = 131_072
    lora: LoraConfig | None = None

    def __post_init__(self):
        require_positive(self, "vocab_size", "embed_dim", "num_heads", "num_kv_heads", "head_dim")
        require_positive(self, "mlp_dim", "num_groups", "max_context")
        if len(self.group_pattern) > MAX_PATTERN:
            raise InputError(
                f"group_pattern of {len(self.group_pattern)} blocks: at most {MAX_PATTERN} may "
                "differ before they repeat, as each is traced and compiled by itself"
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}: each key/value head serves a whole group of query heads"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim={self.head_dim} must be even: rotary pairs split it")

    @property
    def num_layers(self) -> int:
        """Blocks of either kind, in Hugging Face's flat numbering."""
        return self.num_groups * len(self.group_pattern)

    def count(self, kind: BlockKind) -> int:
        return self.num_groups * self.group_pattern.count(kind)


# Of red, green and blue in 0..1: what the encoder's pixels are normalised with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The tiled image encoder: local blocks, then gated global ones.

    `taps` are the local layers before which the intermediate features are taken.
    """

    image_size: int
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_dim: int = 5120
    num_local_layers: int = 32
    num_global_layers: int = 8
    taps: tuple[int, ...] = (3, 7, 15, 23, 30)
    patch_size: int = 14
    max_tiles: int = 4
    norm_eps: float = 1e-5
    lora: LoraConfig | None = None

    def __post_init__(self):
        require_positive(self, "image_size", "patch_size", "embed_dim", "num_heads", "mlp_dim")
        require_positive(self, "num_local_layers", "num_global_layers", "max_tiles")
        if not self.taps:
            raise InputError("taps=() must name a local layer at least")
        if self.image_size % self.patch_size:
            raise InputError(
                f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}"
            )
        if list(self.taps) != sorted(set(self.taps)) or max(self.taps) >= self.num_local_layers:
            raise InputError(
                f"taps={self.taps} must be increasing and below "
                f"num_local_layers={self.num_local_layers}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """The patches of a tile and its class token."""
        return self.grid**2 + 1

    @property
    def feature_dim(self) -> int:
        """The final features beside every intermediate one."""
        return self.embed_dim * (1 + len(self.taps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compat:
    """Whose behaviour to follow in the two places where Hugging Face differs from Meta.

    row_mask: text rows that see no image get nothing from cross-attention ("meta"), or attend to
      every image token of their batch row, and only skip the MLP ("hf", transformers 4.45 to 5.23).
    vision_intermediates: taken before the block of each tap ("meta"), or after it ("hf",
      transformers 4.56 to 5.23).
    """

    row_mask: Behaviour = "meta"
    vision_intermediates: Behaviour = "meta"

    @classmethod
    def like(cls, name: Behaviour) -> "Compat":
        return cls(row_mask=name, vision_intermediates=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What the weights are: a decoder, and for vision models the image encoder beside it.

    reward_head: whether final states are read as rewards, too; of what a document is worth.
    """

    decoder: DecoderConfig
    vision: VisionConfig | None = None
    reward_head: bool = False
    compat: Compat = Compat()

    def __post_init__(self):
        if ("cross" in self.decoder.group_pattern) != (self.vision is not None):
            raise InputError(
                f"group_pattern={self.decoder.group_pattern} and vision={self.vision} disagree: "
                "cross-attention blocks need an image encoder, and only they do"
            )
        if len({(lora.rank, lora.alpha) for lora in self.loras}) > 1:
            raise InputError(
                f"lora={self.decoder.lora} of the decoder and {self.loras[-1]} of the image "
                "encoder disagree: files of adapters have one rank and one alpha"
            )

    @property
    def loras(self) -> tuple[LoraConfig, ...]:
        """The decoder's and the image encoder's, where there are any."""
        found = (self.decoder.lora, self.vision.lora if self.vision is not None else None)
        return tuple(lora for lora in found if lora is not None)

    def without_lora(self) -> "LlamaConfig":
        """The model that adapters are beside of, or are merged into."""
        vision = self.vision and dataclasses.replace(self.vision, lora=None)
        return dataclasses.replace(
            self, decoder=dataclasses.replace(self.decoder, lora=None), vision=vision
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1, at most once, takes what the others leave over.

    From the first to the last, axes are of devices that lie ever closer together.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, spec: str) -> "MeshConfig":
        """From "data=2,fsdp=16,context=1,tensor=8"; -1 is fsdp's unless another axis has it."""
        names = [field.name for field in dataclasses.fields(cls)]
        sizes: dict[str, int] = {}
        for part in filter(None, spec.replace(" ", "").split(",")):
            name, _, size = part.partition("=")
            if name not in names or name in sizes or not size.removeprefix("-").isdecimal():
                raise InputError(
                    f"{part!r} in mesh {spec!r}: give each of the axes {', '.join(names)} once at "
                    "most, with its size, as in fsdp=16,tensor=8"
                )
            sizes[name] = int(size)
        if -1 in sizes.values():
            sizes.setdefault("fsdp", 1)
        return cls(**sizes)

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Devices along each axis, of so many in all."""
        sizes = dataclasses.asdict(self)
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
            raise InputError(f"mesh {sizes}: sizes are positive, and -1 may stand once")
        if free:
            fixed = math.prod(size for size in sizes.values() if size != -1)
            sizes[free[0]] = max(num_devices // fixed, 1)
        if math.prod(sizes.values()) != num_devices:
            raise InputError(f"mesh {sizes} does not cover the {num_devices} devices present")
        return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How attention is computed; what it computes is the same.

    impl: "auto" takes the kernel of the platform (`kernels.attention` has the list).
    across: how devices of the mesh axis "context" get each other's keys: all at once ("gather"),
      or passed round while they compute ("ring"), which needs no room for the whole row.
    vision_keys: devices of that axis share the keys of a row's images, and get each other's like
      those of text ("shared"), or each makes all of them ("replicated").
    """

    impl: Literal["auto", "reference", "tpu", "gpu", "xla", "cudnn"] = "auto"
    across: Literal["gather", "ring"] = "gather"
    vision_keys: Literal["shared", "replicated"] = "shared"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. The command line has these fields as options.

    `generate.sampling.require_valid` looks at the values: the library that reads options would wrap
    an error of this constructor in lines of its own.

    Attributes:
      max_new_tokens: where an answer ends at the latest.
      temperature: 0 takes the likeliest token; 1 draws as the model would.
      top_k: draw from that many likeliest tokens; 0 for all.
      top_p: draw from the likeliest tokens that have this probability together.
      min_p: draw from tokens at least this fraction as likely as the likeliest.
      seed: of the draws; the same seed gives the same answer.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
