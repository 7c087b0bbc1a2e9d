"""Meta's checkpoints become Hugging Face's and come back, by rules that are written here apart.

None of the package's tables has a part in what is expected: the rules are those of the two formats,
by the names and axes that Meta and transformers gave their tensors.
"""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from l32jax import presets
from l32jax.checkpoint import hugging_face, meta, torch_file
from l32jax.checkpoint.engine.tables import their_shapes
from l32jax.checkpoint.hugging_face_tiles import LOST_TILES
from l32jax.conversion.convert import convert
from l32jax.model.llama import shapes_of
from tests.checkpoint_tests.test_meta import weights
from tests.checkpoint_tests.test_meta_files import TEXT, VISION, save

# Names of transformers for those of llama-models, in a decoder layer and in one of the ViT.
LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "gate_attn": "cross_attn_attn_gate",
    "gate_ffwd": "cross_attn_mlp_gate",
}
TOWER_LAYER = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_1.bias": "input_layernorm.bias",
    "ln_2.weight": "post_attention_layernorm.weight",
    "ln_2.bias": "post_attention_layernorm.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
    "gate_attn": "gate_attn",
    "gate_ffn": "gate_ffn",
}
TOWER = {
    "conv1._linear.weight": "patch_embedding.weight",
    "class_embedding": "class_embedding",
    "positional_embedding": "gated_positional_embedding.embedding",
    "gated_positional_embedding": "gated_positional_embedding.tile_embedding.weight",
    "gated_positional_embedding_gate": "gated_positional_embedding.gate",
    "pre_tile_pos_embed.embedding": "pre_tile_positional_embedding.embedding.weight",
    "pre_tile_pos_embed.gate": "pre_tile_positional_embedding.gate",
    "post_tile_pos_embed.embedding": "post_tile_positional_embedding.embedding.weight",
    "post_tile_pos_embed.gate": "post_tile_positional_embedding.gate",
    "ln_pre.weight": "layernorm_pre.weight",
    "ln_pre.bias": "layernorm_pre.bias",
    "ln_post.weight": "layernorm_post.weight",
    "ln_post.bias": "layernorm_post.bias",
}
# Rows and columns of tiles, in the order of the rows of a table; its row 0 is of no image.
RATIOS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (1, 4), 5: (2, 1), 6: (2, 2), 7: (3, 1), 8: (4, 1)}
CELLS = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (3, 0)]  # that rows have
TABLES = {
    "vision_model.vision_encoder.gated_positional_embedding",
    "vision_model.vision_encoder.pre_tile_pos_embed.embedding",
    "vision_model.vision_encoder.post_tile_pos_embed.embedding",
}
MODELS = {"llama_tiny_meta": TEXT, "mllama_tiny_meta": VISION}
SIZES = {
    "llama3.2-1b": presets.LLAMA3_2_1B,
    "llama3.2-3b": presets.LLAMA3_2_3B,
    "llama3.2-11b-vision": presets.LLAMA3_2_11B_VISION,
    "llama3.2-90b-vision": presets.LLAMA3_2_90B_VISION,
}
# Of all parameters, in Meta's format and in Hugging Face's.
PARAMETERS = {
    "llama3.2-1b": (1_235_814_400, 1_235_814_400),
    "llama3.2-3b": (3_212_749_824, 3_212_749_824),
    "llama3.2-11b-vision": (10_616_650_275, 10_642_941_475),
    "llama3.2-90b-vision": (88_552_318_523, 88_593_355_323),
}


def hugging_face_name(name: str) -> str:
    """Of the tensor that has the numbers of Meta's."""
    if name.startswith("vision_model."):
        return _name_in_tower(name)
    decoder = "language_model." if name.startswith("text_model.") else ""
    name = name.removeprefix("text_model.")
    if name == "output.weight":
        return f"{decoder}lm_head.weight"
    return f"{decoder}model.{_name_in_decoder(name, merged=bool(decoder))}"


def _name_in_decoder(name: str, *, merged: bool) -> str:
    """`merged` are self-attention and cross-attention layers in one list, five to a group."""
    if name in ("tok_embeddings.weight", "learnable_embedding.weight"):
        return "embed_tokens.weight"
    if name == "norm.weight":
        return name
    stack, number, rest = re.fullmatch(
        r"(layers|cross_attention_layers)\.(\d+)\.(.+)", name
    ).groups()
    cross, number = stack == "cross_attention_layers", int(number)
    if cross:
        number = 5 * number + 3
    elif merged:
        number = number + (number + 1) // 4
    if found := re.fullmatch(r"attention\.w([qkvo])\.weight", rest):
        rest = f"{'cross_attn' if cross else 'self_attn'}.{found[1]}_proj.weight"
    elif found := re.fullmatch(r"attention\.([qk]_norm\.weight)", rest):
        rest = f"cross_attn.{found[1]}"
    else:
        rest = LAYER[rest]
    return f"layers.{number}.{rest}"


def _name_in_tower(name: str) -> str:
    name = name.removeprefix("vision_model.")
    if name.startswith("vision_projection."):
        return name.replace("vision_projection", "multi_modal_projector")
    name = name.removeprefix("vision_encoder.")
    found = re.fullmatch(r"(transformer|global_transformer)\.resblocks\.(\d+)\.(.+)", name)
    if found is None:
        return f"vision_model.{TOWER[name]}"
    stack, number, rest = found.groups()
    if attention := re.fullmatch(r"attn\.w([qkvo])\.weight", rest):
        rest = f"self_attn.{attention[1]}_proj.weight"
    else:
        rest = TOWER_LAYER[rest]
    return f"vision_model.{stack}.layers.{number}.{rest}"


def is_rotated(name: str) -> bool:
    return bool(re.search(r"(?<!cross_attention_)\blayers\.\d+\.attention\.w[qk]\.weight", name))


def hugging_face_tensors(theirs: dict[str, np.ndarray], head_dim: int) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    # The rows of images stand after those of text.
    for name in sorted(theirs, key=lambda name: "learnable" in name):
        array, new = theirs[name], hugging_face_name(name)
        if is_rotated(name):
            array = halves_of_pairs(array, head_dim)
        elif name in TABLES:
            array = rows_of_grid(array)
        elif name.endswith("conv1._linear.weight"):
            array = array.reshape(len(array), 3, 14, 14)
        made[new] = np.concatenate([made[new], array]) if new in made else array
    return made


def halves_of_pairs(array: np.ndarray, head_dim: int) -> np.ndarray:
    """In each head: rows 0, 2, 4... then rows 1, 3, 5..."""
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    heads = np.split(array, len(array) // head_dim)
    return np.concatenate([head[order] for head in heads])


def rows_of_grid(grid: np.ndarray) -> np.ndarray:
    table = np.zeros((9, 4, *grid.shape[2:]), grid.dtype)
    for row, (height, width) in RATIOS.items():
        for y in range(height):
            for x in range(width):
                table[row, y * width + x] = grid[y, x]
    return table.reshape(9, -1)


def what_is_left(name: str, array: np.ndarray) -> np.ndarray:
    """Of a tensor of Meta's that was in Hugging Face's format: half of a table is lost."""
    if name not in TABLES:
        return array
    left = np.zeros_like(array)
    for y, x in CELLS:
        left[y, x] = array[y, x]
    return left


def read_ranks(folder: Path) -> dict[str, np.ndarray]:
    """Whole tensors of the files, joined where the model-parallel layers of fairscale split."""
    files = [torch_file.open_file(path) for path in sorted(folder.glob("*.pth"))]
    parts = [{name: f.read(name, slice(None)) for name in f.tensors} for f in files]
    return {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}


def _joined(name: str, parts: list[np.ndarray]) -> np.ndarray:
    if re.search(r"\b(wo|w2|c_proj)\.weight$", name):
        return np.concatenate(parts, axis=1)
    by_rows = r"\b(wq|wk|wv|w1|w3|output|tok_embeddings|learnable_embedding|_linear)\.weight$"
    if re.search(by_rows + r"|\b(c_fc|vision_projection)\.(weight|bias)$", name):
        return np.concatenate(parts)
    for part in parts[1:]:
        np.testing.assert_array_equal(part, parts[0], err_msg=name)
    return parts[0]


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_each_tensor_is_what_the_rules_make_of_metas(model, dtype, ranks, tmp_path):
    theirs = {name: array.astype(dtype) for name, array in weights(model).items()}
    source = save(tmp_path / "meta", theirs, MODELS[model], ranks)
    told = convert(source, tmp_path / "hf", to="hf")
    found = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    assert_equal(found, hugging_face_tensors(theirs, head_dim=16))
    assert any(LOST_TILES in note for note in told) == (MODELS[model] is VISION)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_half_of_the_tile_tables_is_all_that_is_lost_on_the_way_back(model, dtype, ranks, tmp_path):
    """Hugging Face's folder is made by the rules alone."""
    theirs = {name: array.astype(dtype) for name, array in weights(model).items()}
    convert(save(tmp_path / "meta", theirs, MODELS[model]), tmp_path / "hf", to="hf")
    made = hugging_face_tensors(theirs, head_dim=16)
    contiguous = {name: np.ascontiguousarray(array) for name, array in made.items()}
    safetensors.numpy.save_file(contiguous, tmp_path / "hf" / "model.safetensors")
    told = convert(tmp_path / "hf", tmp_path / "back", to="meta", ranks=ranks)
    expected = {name: what_is_left(name, array) for name, array in theirs.items()}
    assert_equal(read_ranks(tmp_path / "back"), expected)
    assert any(LOST_TILES in note for note in told) == (MODELS[model] is VISION)
    lost = [name for name in theirs if not np.array_equal(theirs[name], expected[name])]
    assert set(lost) == (TABLES if MODELS[model] is VISION else set())


def meta_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Of the released checkpoints, by the sizes that the model cards and configs give."""
    text = "" if "vision" not in name else "text_model."
    dim, layers, heads, kv_heads, head_dim, hidden, cross, tile = {
        "llama3.2-1b": (2048, 16, 32, 8, 64, 8192, 0, 0),
        "llama3.2-3b": (3072, 28, 24, 8, 128, 8192, 0, 0),
        "llama3.2-11b-vision": (4096, 32, 32, 8, 128, 14336, 8, 448),
        "llama3.2-90b-vision": (8192, 80, 64, 8, 128, 28672, 20, 560),
    }[name]
    block = {
        "attention.wq.weight": (heads * head_dim, dim),
        "attention.wk.weight": (kv_heads * head_dim, dim),
        "attention.wv.weight": (kv_heads * head_dim, dim),
        "attention.wo.weight": (dim, heads * head_dim),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
        "feed_forward.w1.weight": (hidden, dim),
        "feed_forward.w2.weight": (dim, hidden),
        "feed_forward.w3.weight": (hidden, dim),
    }
    gates = {"gate_attn": (1,), "gate_ffwd": (1,)}
    norms = {"attention.q_norm.weight": (head_dim,), "attention.k_norm.weight": (head_dim,)}
    shapes = {
        f"{text}tok_embeddings.weight": (128256, dim),
        f"{text}norm.weight": (dim,),
        f"{text}output.weight": (128256, dim),
    }
    shapes |= {f"{text}layers.{i}.{rest}": s for i in range(layers) for rest, s in block.items()}
    if not cross:
        return shapes
    shapes[f"{text}learnable_embedding.weight"] = (8, dim)
    for i in range(cross):
        layer = f"{text}cross_attention_layers.{i}."
        shapes |= {layer + rest: s for rest, s in (block | gates | norms).items()}
    return shapes | tower_shapes(dim, (tile // 14) ** 2 + 1)


def tower_shapes(dim: int, tokens: int) -> dict[str, tuple[int, ...]]:
    encoder = "vision_model.vision_encoder."
    block = {f"attn.w{letter}.weight": (1280, 1280) for letter in "qkvo"}
    block |= {f"ln_{i}.{kind}": (1280,) for i in (1, 2) for kind in ("weight", "bias")}
    block |= {"mlp.c_fc.weight": (5120, 1280), "mlp.c_fc.bias": (5120,)}
    block |= {"mlp.c_proj.weight": (1280, 5120), "mlp.c_proj.bias": (1280,)}
    gates = {"gate_attn": (1,), "gate_ffn": (1,)}
    shapes = {
        f"{encoder}conv1._linear.weight": (1280, 588),
        f"{encoder}class_embedding": (1280,),
        f"{encoder}positional_embedding": (tokens, 1280),
        f"{encoder}gated_positional_embedding": (4, 4, tokens, 1280),
        f"{encoder}gated_positional_embedding_gate": (1,),
        "vision_model.vision_projection.weight": (dim, 7680),
        "vision_model.vision_projection.bias": (dim,),
    }
    for side in ("pre", "post"):
        shapes[f"{encoder}{side}_tile_pos_embed.embedding"] = (4, 4, 1, 1280)
        shapes[f"{encoder}{side}_tile_pos_embed.gate"] = (1,)
        shapes |= {f"{encoder}ln_{side}.{kind}": (1280,) for kind in ("weight", "bias")}
    for stack, count, parts in (
        ("transformer", 32, block),
        ("global_transformer", 8, block | gates),
    ):
        for i in range(count):
            layer = f"{encoder}{stack}.resblocks.{i}."
            shapes |= {layer + rest: shape for rest, shape in parts.items()}
    return shapes


def hugging_face_shapes(theirs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {}
    for name, shape in theirs.items():
        new = hugging_face_name(name)
        if name in TABLES:
            shape = (9, 4 * shape[2] * shape[3])
        elif name.endswith("conv1._linear.weight"):
            shape = (1280, 3, 14, 14)
        elif new in made:
            shape = (made[new][0] + shape[0], shape[1])
        made[new] = shape
    return made


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_of_the_releases(name):
    """Counts and sums are those of the released checkpoints; nothing is allocated."""
    config, theirs = SIZES[name], meta_shapes(name)
    shapes = shapes_of(config)
    head = {"output.weight"} if config.decoder.tied_embedding else set()  # a copy, if it is there
    assert their_shapes(meta.table(config), shapes) == {
        key: shape for key, shape in theirs.items() if key not in head
    }
    expected = hugging_face_shapes(theirs)
    if head:
        del expected["lm_head.weight"]
    assert their_shapes(hugging_face.table(config), shapes) == expected
    count = sum(int(np.prod(shape)) for key, shape in theirs.items() if key not in head)
    assert count == PARAMETERS[name][0]
    assert sum(int(np.prod(shape)) for shape in expected.values()) == PARAMETERS[name][1]


@pytest.mark.parametrize(
    ("name", "count"), [("llama3.2-11b-vision", 40), ("llama3.2-90b-vision", 100)]
)
def test_cross_attention_is_every_fifth_of_the_merged_layers(name, count):
    norms = [key for key in meta_shapes(name) if key.endswith(".ffn_norm.weight")]
    number = {key: int(hugging_face_name(key).split(".")[3]) for key in norms}
    assert sorted(number.values()) == list(range(count))
    cross = [number[key] for key in norms if "cross_attention_layers" in key]
    assert cross == list(range(3, count, 5))
