"""Valid tiny checkpoints of every format, from which the odd ones are made."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from l32jax.checkpoint import adapters, meta, peft, torch_pickle
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import theirs
from l32jax.checkpoint.engine.transfer import write
from l32jax.checkpoint.hugging_face_config import TokenIds
from l32jax.checkpoint.meta_config import to_json
from l32jax.config import LlamaConfig
from l32jax.conversion.convert import convert
from l32jax.data.tokenizer import Tokenizer
from l32jax.data.tokenizer_export import hugging_face_files
from l32jax.model.llama import shapes_of
from l32jax.model.parameters import flatten
from l32jax.presets import TINY_TEXT, TINY_VISION
from tests.checkpoint_tests.weights import (
    export_hugging_face,
    random_params,
)

SMALL = dict(embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, vocab_size=520)
TEXT = LlamaConfig(decoder=replace(TINY_TEXT.decoder, num_groups=2, **SMALL))
VISION = replace(
    TINY_VISION,
    decoder=replace(TINY_VISION.decoder, num_groups=1, tied_embedding=False, **SMALL),
)
# Nothing but "model" is opened by `open_checkpoint`.
FORMATS = ("safetensors", "hf", "gguf", "meta", "orbax", "adapter", "peft", "tokenizer")
RANK = 4


@dataclass(frozen=True)
class Seed:
    """A checkpoint: `path` is its file or folder, alone in a folder. `kind` is how it is opened."""

    format: str
    path: Path
    kind: str = "model"


def make(home: Path) -> list[Seed]:
    """All of them, below an empty folder."""
    tokenizer = Tokenizer.train(["the cat, the hat", "that is the thing"], num_merges=8)
    for name, config in (("text", TEXT), ("vision", VISION)):
        export_hugging_face(
            random_params(config),
            config,
            home / name / "model",
            dtype=np.float32,
            ids=TokenIds(tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id),
            extra_files=hugging_face_files(tokenizer.vocabulary),
            max_file_bytes=60_000 if name == "text" else 10**9,
        )
    text, vision = home / "text" / "model", home / "vision" / "model"
    seeds = [Seed("hf", text), Seed("hf", vision)]
    for format, source, name, options in (
        ("safetensors", text, "text.safetensors", {}),
        ("safetensors", vision, "vision.safetensors", {"dtype": "bfloat16"}),
        ("gguf", text, "plain.gguf", {}),
        ("gguf", text, "half.gguf", {"dtype": "float16"}),
        ("gguf", text, "quantised.gguf", {"dtype": "q8_0"}),
        ("meta", text, "meta", {}),
        ("meta", vision, "meta-vision", {"ranks": 2}),
        ("orbax", text, "native", {}),
        ("orbax", vision, "native-vision", {"dtype": "float16"}),
    ):
        path = home / name.replace(".", "-") / name
        path.parent.mkdir()
        convert(source, path, to=format, **options)
        seeds.append(Seed(format, path))
    seeds += _quantised(home)
    seeds += _adapters(home)
    return seeds + _tokenizers(home, tokenizer)


def _quantised(home: Path) -> list[Seed]:
    """In the layout of Meta's SpinQuant and QLoRA releases."""
    slices = Slices.of(random_params(TEXT))
    source = theirs(meta.table(TEXT), slices)
    seeds = []
    for name, lora in (("spinquant", None), ("qlora", {"rank": RANK, "scale": 2.0})):
        arrays: dict[str, np.ndarray] = {}
        for tensor in source.tensors:
            array = source.read(tensor, slice(None))
            arrays |= (
                _rounded(tensor, array, lora is not None) if array.ndim == 2 else {tensor: array}
            )
        folder = home / name / "model"
        folder.mkdir(parents=True)
        quantisation = {"quantization_args": {"group_size": 16}, "lora_args": lora}
        params = {**to_json(TEXT), **quantisation, "use_scaled_rope": False}
        (folder / "params.json").write_text(json.dumps(params))
        _save(folder / "consolidated.00.pth", arrays)
        seeds.append(Seed("meta", folder))
    return seeds


def _rounded(name: str, array: np.ndarray, has_adaptor: bool) -> dict[str, np.ndarray]:
    prefix, (outs, ins) = name.removesuffix("weight"), array.shape
    in_block = name.startswith("layers.")
    parts = {
        name: np.round(array * 10).astype(np.int8),
        f"{prefix}scales": np.full((outs, ins // 16 if in_block else 1), 0.1, np.float32),
    }
    if has_adaptor and in_block:
        parts[f"{prefix}adaptor.A.weight"] = np.ones((RANK, ins), np.float32)
        parts[f"{prefix}adaptor.B.weight"] = np.ones((outs, RANK), np.float32)
    return parts


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """As torch.save does; our own way to write refuses whole numbers."""
    with zipfile.ZipFile(path, "w") as archive:
        tensors = Source.of(dict(arrays), "seed").tensors
        archive.writestr("consolidated/data.pkl", torch_pickle.write(tensors))
        archive.writestr("consolidated/byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"consolidated/data/{key}", array.tobytes())


def _adapters(home: Path) -> list[Seed]:
    seeds = []
    for name, config in (("text", TEXT), ("vision", VISION)):
        adapter = adapters.Adapter(_lora(config), RANK, 2.0)
        file, folder = (
            home / f"lora-{name}" / "adapter.safetensors",
            home / f"peft-{name}" / "model",
        )
        file.parent.mkdir()
        folder.parent.mkdir()
        write(adapters.plan_ours(adapter, config, about={}), file)
        write(peft.plan(adapter, config, about={}), folder)
        seeds += [Seed("adapter", file, "adapter"), Seed("peft", folder, f"peft-{name}")]
    return seeds


def _lora(config: LlamaConfig) -> Slices:
    model = shapes_of(config)
    weights = [path for path in model if adapters.can_be_adapted(path)]
    random = np.random.default_rng(0)
    tree: dict = {}
    for path, shape in adapters.shapes(weights, model, RANK).items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = random.standard_normal(shape).astype(np.float32)
    assert len(flatten(tree)) == 2 * len(weights)
    return Slices.of(tree)


def _tokenizers(home: Path, tokenizer: Tokenizer) -> list[Seed]:
    """Beside a model of one file, so that little but the tokenizer is read."""
    config = (home / "text" / "model" / "config.json").read_bytes()
    template = b"{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{% endfor %}"
    both = hugging_face_files(tokenizer.vocabulary) | {"chat_template.jinja": template}
    kinds = {
        "json": both,
        "ranks": {"tokenizer.model": tokenizer.to_bytes()},
        "smol": _without_llama3(both),
    }
    seeds = []
    for name, files in kinds.items():
        folder = home / f"tokenizer-{name}" / "model"
        folder.mkdir(parents=True)
        hugging_face_model = home / "text" / "model"
        for file in hugging_face_model.glob("model*"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "config.json").write_bytes(config)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        seeds.append(Seed("tokenizer", folder, "tokenizer"))
    gguf = home / "tokenizer-gguf" / "model.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes((home / "plain-gguf" / "plain.gguf").read_bytes())
    return [*seeds, Seed("tokenizer", gguf, "tokenizer")]


def _without_llama3(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same in the manner of SmolLM2, whose chats go through its template."""
    content = json.loads(files["tokenizer.json"])
    content["added_tokens"] = [
        {**token, "content": "<|im_end|>"} if token["content"] == "<|eot_id|>" else token
        for token in content["added_tokens"]
        if token["content"] not in ("<|python_tag|>", "<|eom_id|>")
    ]
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
        ],
    }
    content["post_processor"] = None
    return {**files, "tokenizer.json": json.dumps(content).encode()}
