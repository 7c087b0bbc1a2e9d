"""The way in, for notebooks and the command line: load a model, run a configured training."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from l32jax.checkpoint.engine.folders import is_remote
from l32jax.checkpoint.engine.slices import load as load_slices
from l32jax.checkpoint.formats import Checkpoint, open_checkpoint
from l32jax.checkpoint.steps import Steps
from l32jax.config import Behaviour, Compat, LlamaConfig, TrainConfig
from l32jax.config_text import did_you_mean
from l32jax.data import tokenizer_files
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.generate.model import Model, require_matching
from l32jax.model.llama import abstract_params, init_params
from l32jax.model.parameters import on_mesh
from l32jax.presets import PRESETS
from l32jax.sharding import make_mesh, single_device_mesh
from l32jax.train.loop import stage_directory, train

META = Compat()

logger = logging.getLogger(__name__)


def load(
    source: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    compat: Behaviour | Compat = "meta",
    tokenizer: str | Path | None = None,
    seed: int = 0,
) -> Model:
    """A model from a path in any format that l32jax converts, or from a preset's name.

    Args:
      source: a folder of Hugging Face's or Meta's, a GGUF or safetensors file, the folder of a run,
        a converted checkpoint (also gs:// or s3://), or a preset: random parameters by `seed`.
      mesh: where parameters and activations live; by default one device.
      dtype: of both; by default bfloat16, on CPU float32.
      compat: whose behaviour to follow where Hugging Face differs from Meta.
      tokenizer: its file or folder, if it does not stand beside the weights.
    Raises:
      InputError: the path holds no model, or one that is damaged or of another architecture.
    """
    mesh = mesh or single_device_mesh()
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    compat = compat if isinstance(compat, Compat) else Compat.like(compat)
    found = Tokenizer.from_file(tokenizer) if tokenizer else None
    if str(source) in PRESETS:
        config = replace(PRESETS[str(source)], compat=compat)
        found = found or _bytes_tokenizer(config)
        require_matching(found, config, str(tokenizer))
        with jax.set_mesh(mesh):
            params = jax.jit(partial(init_params, config, dtype=dtype))(jax.random.key(seed))
        return Model(config, params, found, mesh)
    if not is_remote(source) and not Path(source).exists():
        hint = did_you_mean(str(source), PRESETS)
        raise InputError(f"model {str(source)!r}: neither a path nor a preset{hint}")
    checkpoint = open_checkpoint(source)
    for note in checkpoint.notes:
        logger.warning("%s: %s", source, note)
    found = found or tokenizer_of(checkpoint, source)
    require_matching(found, checkpoint.config, str(tokenizer or source))
    return model_of(checkpoint, found, mesh=mesh, dtype=dtype, compat=compat)


def tokenizer_of(checkpoint: Checkpoint, where: str | Path) -> Tokenizer | None:
    """The tokenizer that is in a checkpoint, if there is one."""
    if checkpoint.format == "gguf":
        return Tokenizer.from_file(where)
    if not checkpoint.files.keys().isdisjoint(tokenizer_files.FILES):
        return Tokenizer.from_files(checkpoint.files, where)
    return None


def model_of(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    *,
    mesh: Mesh | None = None,
    dtype: Any,
    compat: Compat = META,
) -> Model:
    """The weights of a checkpoint on devices; each process reads the slices that it holds."""
    mesh = mesh or single_device_mesh()
    config = replace(checkpoint.config, compat=compat)
    with jax.set_mesh(mesh):
        targets = on_mesh(abstract_params(config, dtype), mesh)
    return Model(config, load_slices(checkpoint.slices, targets), tokenizer, mesh)


def run(config: TrainConfig) -> Model:
    """Trains what is left of a run, on every device, and returns what came of it.

    Raises:
      InputError: a path or the data is wrong, or `start_from` is not the config's model.
      Interrupted: the run was asked to stop, and has saved.
    """
    mesh = make_mesh(config.mesh)
    model = _beginning(config, mesh)
    tokenizer = model.require_tokenizer()
    params, model.params = model.params, None
    model.params = train(config, tokenizer, params, mesh)
    return model


def _beginning(config: TrainConfig, mesh: Mesh) -> Model:
    """Where the first stage starts; without parameters if those are random, or it has begun."""
    if config.start_from is None:
        tokenizer = Tokenizer.from_file(config.tokenizer) if config.tokenizer else None
        tokenizer = tokenizer or _bytes_tokenizer(config.model)
        require_matching(tokenizer, config.model, str(config.tokenizer))
        return Model(config.model, None, tokenizer, mesh)
    model = load(
        config.start_from,
        mesh=mesh,
        dtype=jnp.float32,
        compat=config.model.compat,
        tokenizer=config.tokenizer,
        seed=config.seed,
    )
    if model.config != config.model:
        raise InputError(
            f"start_from {config.start_from!r} of the run: it is not the model of the config; "
            "give weights of the same architecture, or change `model`"
        )
    if Steps(stage_directory(config, 0)).all():
        model.params = None
    return model


def _bytes_tokenizer(config: LlamaConfig) -> Tokenizer | None:
    """For tiny models, the tokenizer that needs no file."""
    tokenizer = Tokenizer.bytes_only()
    return tokenizer if tokenizer.num_tokens == config.decoder.vocab_size else None
