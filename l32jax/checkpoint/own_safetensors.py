"""One safetensors file of our parameters under our names, for whoever reads arrays without us.

    arrays = safetensors.numpy.load_file("model.safetensors")
    arrays["decoder/groups/blocks/0/mlp/up/weight"]  # [layers, f, d]

The configuration is in the file's metadata, so the file is a whole model; its tokenizer is not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l32jax.checkpoint import own_config, tensors
from l32jax.checkpoint.engine.flat_files import FlatFiles
from l32jax.checkpoint.engine.slices import Shape, Slices, homes_of
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import SAME, SCALAR, Part, Table, ours, their_shapes, theirs
from l32jax.config import LlamaConfig
from l32jax.config_text import to_json
from l32jax.errors import InputError
from l32jax.model.llama import shapes_of

CONFIG_KEY, FILE = "l32jax_config", "model.safetensors"


def table(shapes: Mapping[str, Shape]) -> Table:
    """Our own names: the layers of a stacked parameter are consecutive rows of one tensor."""
    return [
        Part(path, path, SAME if shape[home.layer is not None :] else SCALAR, home.layer)
        for path, shape in shapes.items()
        for home in homes_of(path, shape)
    ]


def open_model(path: Path) -> tuple[LlamaConfig, Slices]:
    """InputError if the file is damaged, is not one of these, or does not fit its own config."""
    text = tensors.read_metadata(path).get(CONFIG_KEY)
    if text is None:
        raise InputError(
            f"weights in {path}: a safetensors file without a config; give the folder that has "
            "its config.json"
        )
    config = own_config.read(own_config.parsed(text, str(path)), str(path))
    shapes = shapes_of(config)
    in_rows = their_shapes(table(shapes), shapes)
    arrays, release = tensors.open_arrays(path)
    rows = {
        name: array.reshape(in_rows[name]) if array.shape == shapes.get(name) else array
        for name, array in arrays.items()
    }
    return config, ours(table(shapes), Source.of(rows, str(path), release), shapes)


def plan(slices: Slices, config: LlamaConfig, *, about: Mapping[str, Any]) -> FlatFiles:
    """The model in one file; weights have the dtypes of `slices`."""
    source = theirs(table(slices.shapes), slices)
    file = tensors.plan_file(
        source, source.tensors, FILE, {CONFIG_KEY: to_json(config)}, shapes=slices.shapes
    )
    return FlatFiles([file], about, single=FILE)
