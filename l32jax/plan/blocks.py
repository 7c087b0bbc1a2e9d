"""What one device is given of a model: its blocks, by the numbers that cost follows from."""

import dataclasses
from collections.abc import Mapping

from l32jax.config import DecoderConfig, LlamaConfig, Part
from l32jax.data.rows import VisionShape
from l32jax.data.sources.mixture import row_shape
from l32jax.plan.workload import padded_tokens
from l32jax.run_config import TrainConfig
from l32jax.train.flops import reaches_tower


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Blocks of one kind. Widths are the model's; `share` devices split heads and MLP.

    tokens, projected: of a device and a microbatch; those that ask, and those that keys are of.
    seen: keys that a query sees on average.
    matrices: of the MLP. together: blocks that the backward pass computes again at once.
    flows: gradients reach its inputs.
    """

    part: Part
    layers: int
    tokens: float
    projected: float
    seen: float
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    matrices: int
    together: int
    share: int
    learns: bool
    flows: bool

    @property
    def queried(self) -> int:
        return self.heads * self.head_dim

    @property
    def keyed(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def weights(self) -> int:
        """Of one of them."""
        attention = 2 * self.width * (self.queried + self.keyed)
        return attention + self.matrices * self.width * self.mlp

    @property
    def backward(self) -> bool:
        return self.learns or self.flows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """The rest. Words are looked up in one table and scored with another, if they are not tied.

    projected: image tokens of a device and a microbatch on their way into the width of the text.
    """

    words: int
    width: int
    count: int
    tokens: float
    projected: float
    feature_dim: int
    learns: bool
    projector_learns: bool
    features_flow: bool

    @property
    def weights(self) -> int:
        """Of one table."""
        return self.words * self.width

    @property
    def projector(self) -> int:
        return self.feature_dim * self.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """rows: of a device and a microbatch. tiles: of its image slots; 0 where nothing is encoded."""

    blocks: tuple[Block, ...]
    tables: Tables
    rows: float
    tiles: float


def work_of(config: TrainConfig, number: int, mesh: Mapping[str, int]) -> Work:
    """Of a stage, on a mesh of these sizes."""
    stage, model = config.stages[number], config.model_of(number)
    rows = stage.data.batch_size / (mesh["data"] * mesh["fsdp"] * stage.accumulate)
    vision = row_shape(stage.data, model).vision
    trains = frozenset(stage.trains)
    tokens = rows * stage.data.length / mesh["context"]
    blocks = [_self(model.decoder, tokens, stage.data.length, mesh, trains)]
    projected = tiles = 0.0
    if vision is not None:
        shared = mesh["context"] if config.attention.vision_keys == "shared" else 1
        if vision.slots % shared:
            shared = 1
        blocks.append(_cross(model.decoder, vision, tokens, rows, shared, mesh, trains))
        slots = rows * vision.max_images * vision.encoder.max_tiles / mesh["context"]
        projected = slots * vision.encoder.tokens_per_tile
        tiles = 0.0 if stage.data.features is not None else slots
        if tiles:
            blocks.append(_tower(vision, tiles, mesh, trains))
    tables = _tables(model, tokens, projected, trains)
    return Work(blocks=tuple(blocks), tables=tables, rows=rows, tiles=tiles)


def _decoder(decoder: DecoderConfig, mesh: Mapping[str, int]) -> dict[str, int]:
    return {
        "width": decoder.embed_dim,
        "heads": decoder.num_heads,
        "kv_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "mlp": decoder.mlp_dim,
        "matrices": 3,
        "together": len(decoder.group_pattern),
        "share": mesh["tensor"],
    }


def _self(decoder, tokens: float, length: int, mesh: Mapping[str, int], trains) -> Block:
    return Block(
        part="language_model",
        layers=decoder.count("self"),
        tokens=tokens,
        projected=tokens,
        seen=(length + 1) / 2,
        learns="language_model" in trains,
        flows=bool(trains),
        **_decoder(decoder, mesh),
    )


def _cross(
    decoder, vision: VisionShape, tokens: float, rows: float, shared: int, mesh, trains
) -> Block:
    images = vision.slots * vision.encoder.tokens_per_tile
    return Block(
        part="adapter",
        layers=decoder.count("cross"),
        tokens=tokens,
        projected=rows * images / shared,
        seen=images / vision.max_images,
        learns="adapter" in trains,
        flows=bool(trains),
        **_decoder(decoder, mesh),
    )


def _tower(vision: VisionShape, tiles: float, mesh: Mapping[str, int], trains) -> Block:
    encoder = vision.encoder
    padded = padded_tokens(encoder)
    return Block(
        part="vision_tower",
        layers=encoder.num_local_layers + encoder.num_global_layers,
        tokens=tiles * padded,
        projected=tiles * padded,
        seen=float(encoder.max_tiles * padded),
        width=encoder.embed_dim,
        heads=encoder.num_heads,
        kv_heads=encoder.num_heads,
        head_dim=encoder.embed_dim // encoder.num_heads,
        mlp=encoder.mlp_dim,
        matrices=2,
        together=1,
        share=mesh["tensor"],
        learns="vision_tower" in trains,
        flows=reaches_tower(encoder, trains),
    )


def _tables(model: LlamaConfig, tokens: float, projected: float, trains) -> Tables:
    decoder = model.decoder
    return Tables(
        words=decoder.vocab_size,
        width=decoder.embed_dim,
        count=1 if decoder.tied_embedding else 2,
        tokens=tokens,
        projected=projected,
        feature_dim=model.vision.feature_dim if model.vision else 0,
        learns="language_model" in trains,
        projector_learns="adapter" in trains,
        features_flow=model.vision is not None and reaches_tower(model.vision, trains),
    )
