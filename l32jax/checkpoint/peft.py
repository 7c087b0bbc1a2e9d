"""PEFT's folders of LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from l32jax.checkpoint import hugging_face, tensors
from l32jax.checkpoint.adapters import Adapter, can_be_adapted, pair_of, shapes
from l32jax.checkpoint.engine.flat_files import FlatFiles
from l32jax.checkpoint.engine.slices import Shape
from l32jax.checkpoint.engine.sources import Source, Tensor
from l32jax.checkpoint.engine.tables import (
    HEADS_IN,
    HEADS_OUT,
    SAME,
    Part,
    Table,
    ours,
    their_shapes,
    theirs,
)
from l32jax.checkpoint.peft_config import CONFIG, PeftSettings, read_settings
from l32jax.config import LlamaConfig
from l32jax.errors import InputError
from l32jax.model.llama import shapes_of

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every module's name
NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.(?:default\.)?weight")
# PEFT saves the frozen head of a model beside the adapter of that head.
FROZEN_HEAD = re.compile(re.escape(PREFIX) + r"(?:.+\.)?lm_head\.base_layer\.weight")


def _linears(config: LlamaConfig, prefixes: hugging_face.Prefixes | None = None) -> Table:
    """The weights that can be adapted, under the names of modules in memory if not others."""
    if prefixes is None:
        text = config.vision is None
        prefixes = hugging_face.TEXT if text else hugging_face.VISION_IN_MEMORY
    parts = hugging_face.table(config, prefixes)
    return [part for part in parts if can_be_adapted(part.ours)]


def _module(part: Part) -> str:
    return part.theirs.removesuffix(".weight")


def _table(linears: Table) -> Table:
    """A's and B's part for each weight: heads are on the side that they have in the weight."""
    table = []
    for part in linears:
        a, b = pair_of(part.ours)
        name = f"{PREFIX}{_module(part)}.lora_"
        a_layout = HEADS_IN if part.layout is HEADS_IN else SAME
        b_layout = HEADS_OUT if part.layout is HEADS_OUT else SAME
        table.append(Part(a, f"{name}A.weight", a_layout, part.layer))
        table.append(Part(b, f"{name}B.weight", b_layout, part.layer))
    return table


class _Module(NamedTuple):
    """A weight's adapter in a file: the names of its tensors, and what they are."""

    linear: Part
    a: str
    b: str
    rank: int
    scale: float


def _pairs(source: Source) -> dict[str, dict[str, str]]:
    """Names of tensors by module and letter. InputError for one that is neither A nor B."""
    pairs: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        match = NAME.fullmatch(name)
        if match is None and FROZEN_HEAD.fullmatch(name):
            continue
        if match is None or match[2] in pairs.get(match[1], {}):
            raise InputError(
                f"adapter in {source.where}: tensor {name!r:.200} is more than LoRA of "
                "linear layers, which alone is read; merge it with PEFT, and convert the merged "
                "model"
            )
        pairs.setdefault(match[1], {})[match[2]] = name
    return pairs


def _modules(source: Source, config: LlamaConfig, settings: PeftSettings) -> dict[str, _Module]:
    """All adapters in a file, by the name of the module in memory."""
    known, modules = _known(config), {}
    for name, pair in _pairs(source).items():
        if name not in known or _module(known[name]) in modules:
            raise InputError(_no_place(name, source, config))
        if len(pair) < 2:
            raise InputError(
                f"adapter in {source.where}: module {name!r:.200} has lora_{min(pair)} alone; "
                "download it again"
            )
        linear, a, b = known[name], pair["A"], pair["B"]
        rank = next(iter(source.tensors[a].shape), 0)
        if rank not in settings.ranks:
            raise InputError(
                f"tensor {a!r:.200} in {source.where}: its rank is {rank}, {CONFIG} says "
                f"{' or '.join(map(str, sorted(settings.ranks)))}; download the two again"
            )
        modules[_module(linear)] = _Module(linear, a, b, rank, settings.scale(name, rank))
    if not modules:
        raise InputError(f"adapter in {source.where}: it has no LoRA tensors; download it again")
    return modules


def _known(config: LlamaConfig) -> dict[str, Part]:
    """Weights that can be adapted, by the name of the module in any release of transformers."""
    linears = _linears(config)
    layouts = [linears]
    if config.vision is not None:
        layouts.append(_linears(config, hugging_face.VISION))
    return {
        _module(part): linear
        for layout in layouts
        for part, linear in zip(layout, linears, strict=True)
    }


def _no_place(name: str, source: Source, config: LlamaConfig) -> str:
    if name.endswith("lm_head") and config.decoder.tied_embedding:
        return (
            f"adapter in {source.where}: it adapts {name!r}, which in this model is the embedding; "
            "untie them in the base, or leave the head out"
        )
    return (
        f"adapter in {source.where}: module {name!r:.200} has no place in this model, or two; "
        "take the model it was trained with"
    )


def _require_shapes(source: Source, modules: Iterable[_Module], model: Mapping[str, Shape]) -> None:
    for module in modules:
        table = _table([module.linear])
        own = shapes([module.linear.ours], model, module.rank)
        for part, name in zip(table, (module.a, module.b), strict=True):
            shape = own[part.ours] if part.layer is None else own[part.ours][1:]
            expected, found = part.layout.their_shape(shape), source.tensors[name].shape
            if found != expected:
                raise InputError(
                    f"tensor {name!r} in {source.where}: its shape is {list(found)}, this model "
                    f"needs {list(expected)}; take the model it was trained with"
                )


def open_peft(directory: str | Path, config: LlamaConfig) -> Adapter:
    """A folder that PEFT's `save_pretrained` wrote for a model of this configuration.

    Where a layer has no adapter, or one of smaller rank than another, there are zeros. Scales that
    differ from the most frequent one go into lora_b, all then in float32. InputError for what is
    more than LoRA, for what does not fit the model, and for damaged files.
    """
    directory = Path(directory)
    settings = read_settings(tensors.inside(directory, CONFIG))
    source = tensors.open_file(tensors.inside(directory, WEIGHTS))
    modules = _modules(source, config, settings)
    model = shapes_of(config)
    _require_shapes(source, modules.values(), model)
    rank = max(module.rank for module in modules.values())
    scale = Counter(module.scale for module in modules.values()).most_common(1)[0][0]
    weights = {module.linear.ours for module in modules.values()}
    table = _table([linear for linear in _linears(config) if linear.ours in weights])
    own = shapes(weights, model, rank)
    complete = _complete(source, modules, their_shapes(table, own), scale)
    return Adapter(ours(table, complete, own), rank, scale)


def _complete(
    source: Source, modules: Mapping[str, _Module], wanted: Mapping[str, Shape], scale: float
) -> Source:
    """The same in tensors of these names and shapes, with zeros where the file has nothing."""
    stored = {f"{PREFIX}{name}.lora_A.weight": module.a for name, module in modules.items()}
    stored |= {f"{PREFIX}{name}.lora_B.weight": module.b for name, module in modules.items()}
    ratios = {m.b: m.scale / scale for m in modules.values() if m.scale != scale}
    dtypes = {source.tensors[name].dtype for name in stored.values()}
    dtype = np.dtype(jnp.result_type(*dtypes, *([np.float32] if ratios else [])))

    def read(name: str, rows: slice) -> np.ndarray:
        begin, end, _ = rows.indices(wanted[name][0])
        values = np.zeros((end - begin, wanted[name][1]), dtype)
        if name in stored:
            found = source.read(stored[name], rows)
            ratio = ratios.get(stored[name])
            values[: len(found), : found.shape[1]] = (
                found if ratio is None else found.astype(np.float64) * ratio
            )
        return values

    complete = {name: Tensor(shape, dtype) for name, shape in wanted.items()}
    return Source(source.where, complete, read, source.release)


def plan(
    adapter: Adapter,
    config: LlamaConfig,
    *,
    base_model_name: str | None = None,
    about: Mapping[str, Any],
) -> FlatFiles:
    """A folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    Its tensors have the dtypes of the adapter. Modules have the names of transformers 5, in memory:
    those that PEFT itself writes.
    """
    linears, adapted = _linears(config), set(adapter.weights)
    chosen = [linear for linear in linears if linear.ours in adapted]
    source = theirs(_table(chosen), adapter.slices)
    alpha = adapter.scale * adapter.rank
    whole = round(alpha)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": whole if whole / adapter.rank == adapter.scale else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(map(_module, chosen), map(_module, linears)),
    }
    small = {CONFIG: (json.dumps(content, indent=2) + "\n").encode()}
    return FlatFiles([tensors.plan_file(source, source.tensors, WEIGHTS)], about, small)


def _targets(chosen: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The shortest ends of the chosen modules' names that no other module's name has."""
    chosen = list(chosen)
    meant = Counter(end for name in chosen for end in _ends(name))
    there = Counter(end for name in modules for end in _ends(name))
    return sorted({next(e for e in _ends(name) if meant[e] == there[e]) for name in chosen})


def _ends(name: str) -> list[str]:
    """Of a.b.c: c, b.c, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
