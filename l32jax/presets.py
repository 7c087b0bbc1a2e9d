"""The members of the family, and the tiny ones that tests train.

Sources: llama-models `sku_list.py` (shapes), the model cards (context, image sizes).
"""

import math
from dataclasses import replace

from l32jax.config import (
    BlockKind,
    DecoderConfig,
    LlamaConfig,
    MeshConfig,
    RopeScaling,
    VisionConfig,
)
from l32jax.config_text import did_you_mean
from l32jax.errors import InputError

LLAMA3_2_1B = LlamaConfig(
    decoder=DecoderConfig(
        vocab_size=128_256,
        embed_dim=2048,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=8192,
        num_groups=16,
        tied_embedding=True,
        rope_scaling=RopeScaling(factor=32.0),
    )
)
LLAMA3_2_3B = LlamaConfig(
    decoder=replace(LLAMA3_2_1B.decoder, embed_dim=3072, num_heads=24, head_dim=128, num_groups=28)
)
LLAMA3_1_8B = LlamaConfig(
    decoder=DecoderConfig(
        vocab_size=128_256,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14_336,
        num_groups=32,
        rope_scaling=RopeScaling(factor=8.0),
    )
)
LLAMA3_1_70B = LlamaConfig(
    decoder=replace(
        LLAMA3_1_8B.decoder, embed_dim=8192, num_heads=64, mlp_dim=28_672, num_groups=80
    )
)


def with_vision(trunk: LlamaConfig, vision: VisionConfig, *, every: int = 4) -> LlamaConfig:
    """The trunk with a cross-attention block before every fourth self-attention one, or `every`."""
    layers = trunk.decoder.num_groups
    if trunk.decoder.group_pattern != ("self",):
        raise InputError(
            f"trunk of a vision model: it has the group_pattern {trunk.decoder.group_pattern}; "
            "give a text model's"
        )
    if every < 1 or layers % every:
        raise InputError(
            f"trunk of {layers} layers: groups of {every} cannot hold them all; let `every` be a "
            "divisor"
        )
    before: tuple[BlockKind, ...] = ("self",) * (every - 1)
    decoder = replace(
        trunk.decoder, num_groups=layers // every, group_pattern=(*before, "cross", "self")
    )
    return LlamaConfig(decoder=decoder, vision=vision)


LLAMA3_2_11B_VISION = with_vision(LLAMA3_1_8B, VisionConfig(image_size=448))
LLAMA3_2_11B_VISION_INSTRUCT = with_vision(LLAMA3_1_8B, VisionConfig(image_size=560))
LLAMA3_2_90B_VISION = with_vision(LLAMA3_1_70B, VisionConfig(image_size=560))

SMOLLM2_135M = LlamaConfig(
    decoder=DecoderConfig(
        vocab_size=49_152,
        embed_dim=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        num_groups=30,
        tied_embedding=True,
        rope_theta=100_000.0,
        max_context=8192,
    )
)

# 256 bytes and 256 special tokens: the tokenizer that needs no file.
TINY_TEXT = LlamaConfig(
    decoder=DecoderConfig(
        vocab_size=512,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=160,
        num_groups=4,
        tied_embedding=True,
        rope_scaling=RopeScaling(factor=32.0),
        max_context=1024,
    )
)
TINY_VISION = with_vision(
    TINY_TEXT,
    VisionConfig(
        image_size=28,
        embed_dim=32,
        num_heads=2,
        mlp_dim=64,
        num_local_layers=3,
        num_global_layers=1,
        taps=(1, 2),
    ),
)

PRESETS = {
    "llama3.2-1b": LLAMA3_2_1B,
    "llama3.2-3b": LLAMA3_2_3B,
    "llama3.1-8b": LLAMA3_1_8B,
    "llama3.1-70b": LLAMA3_1_70B,
    "llama3.2-11b-vision": LLAMA3_2_11B_VISION,
    "llama3.2-11b-vision-instruct": LLAMA3_2_11B_VISION_INSTRUCT,
    "llama3.2-90b-vision": LLAMA3_2_90B_VISION,
    "smollm2-135m": SMOLLM2_135M,
    "tiny-text": TINY_TEXT,
    "tiny-vision": TINY_VISION,
}

# Devices that share the parameters of models up to so wide; further ones hold copies (mesh axis
# "data"). On TPUs every slice has room for that, and fetching hides behind the products. Machines
# of GPUs have slow links between them: as few share as leave room for activations.
# tests/plan_tests/test_mesh_presets.py holds them against all other meshes.
SHARERS = {
    "tpu": ((8192, 256),),
    "gpu": ((3072, 8), (4096, 64), (8192, 256)),  # 1B and 3B; 8B and 11B; 70B and 90B
}


def mesh_for(model: LlamaConfig, platform: str, devices: int) -> MeshConfig:
    """How so many devices divide the work of training, where nothing else is asked for.

    Args:
      platform: tpu, gpu or cpu, as JAX names them.
    """
    decoder, vision = model.decoder, model.vision
    widths = math.gcd(decoder.embed_dim, vision.embed_dim if vision else 0)
    known = [most for width, most in SHARERS.get(platform, ()) if decoder.embed_dim <= width]
    most = min(known, default=devices)
    ways = [n for n in range(1, most + 1) if devices % n == 0 and widths % n == 0]
    return MeshConfig(data=devices // ways[-1], fsdp=ways[-1])


def preset(name: str) -> LlamaConfig:
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
