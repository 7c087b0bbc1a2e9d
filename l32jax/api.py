"""The way in, for notebooks and the command line: load a model, run a configured training."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from l32jax.align.own_answers import OwnAnswers
from l32jax.checkpoint.engine.folders import is_remote
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.slices import load as load_slices
from l32jax.checkpoint.formats import Checkpoint, open_checkpoint
from l32jax.checkpoint.graft import graft, is_trunk, overlaid
from l32jax.checkpoint.steps import Steps
from l32jax.config import Behaviour, Compat, LlamaConfig
from l32jax.config_text import did_you_mean
from l32jax.data import tokenizer_files
from l32jax.data.shards import tokenizer_digest
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.generate.model import Model, require_matching
from l32jax.model.llama import abstract_params, init_params
from l32jax.model.matrices import is_projection
from l32jax.model.parameters import Params, combine, on_mesh, partition, path_name, trains
from l32jax.model.quantise import frozen_as
from l32jax.objective_config import Grpo, Teacher
from l32jax.presets import PRESETS, mesh_for
from l32jax.run_config import TrainConfig
from l32jax.sharding import make_mesh, require_divisible, single_device_mesh
from l32jax.train.loop import Fed, rows_of_stage, stage_directory, train

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
    found = _find(source, tokenizer, compat)
    return Model(found.config, _params(found, mesh, dtype, seed), found.tokenizer, mesh)


class _Found(NamedTuple):
    """A model whose parameters are yet to be read, or to be made if `slices` is None."""

    config: LlamaConfig
    slices: Slices | None
    tokenizer: Tokenizer | None


def _find(source: str | Path, tokenizer: str | Path | None, compat: Compat) -> _Found:
    found = Tokenizer.from_file(tokenizer) if tokenizer else None
    if str(source) in PRESETS:
        config = replace(PRESETS[str(source)], compat=compat)
        found = _fitting(found or _bytes_tokenizer(config), config, str(tokenizer))
        return _Found(config, None, found)
    if not is_remote(source) and not Path(source).exists():
        hint = did_you_mean(str(source), PRESETS)
        raise InputError(f"model {str(source)!r}: neither a path nor a preset{hint}")
    checkpoint = open_checkpoint(source)
    for note in checkpoint.notes:
        logger.warning("%s: %s", source, note)
    config = replace(checkpoint.config, compat=compat)
    found = found or tokenizer_of(checkpoint, source)
    found = _fitting(found, config, str(tokenizer or source))
    return _Found(config, checkpoint.slices, found)


def _fitting(found: Tokenizer | None, config: LlamaConfig, where: str) -> Tokenizer | None:
    """The tokenizer as the model needs it; InputError if it is another model's."""
    require_matching(found, config, where)
    return found.with_image_token() if found is not None and config.vision is not None else found


def _params(found: _Found, mesh: Mesh, dtype: Any, seed: int) -> Params:
    """On devices; each process reads the slices that it holds."""
    require_divisible(found.config, "the model", mesh.shape)
    with jax.set_mesh(mesh):
        if found.slices is None:
            init = partial(init_params, found.config, dtype=dtype)
            return jax.jit(init)(jax.random.key(seed))
        targets = on_mesh(abstract_params(found.config, dtype), mesh)
    return load_slices(found.slices, targets)


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
    found = _Found(config, checkpoint.slices, tokenizer)
    return Model(config, _params(found, mesh, dtype, 0), tokenizer, mesh)


def run(config: TrainConfig) -> Model:
    """Trains what is left of a run, on every device, and returns what came of it.

    Raises:
      InputError: a path or the data is wrong, or `start_from` is neither the config's model, nor
        that without LoRA or reward head, nor the text model that it is built on.
      Interrupted: the run was asked to stop, and has saved.
    """
    mesh = mesh_of(config)
    model = _beginning(config, mesh)
    tokenizer = model.require_tokenizer()
    params, model.params = model.params, None
    load_teacher = partial(_teacher, config, tokenizer, mesh)
    model.params = train(config, tokenizer, params, mesh, load_teacher, _open_rows)
    model.config = config.model_of(len(config.stages) - 1)
    return model


def _open_rows(config: TrainConfig, number: int, tokenizer: Tokenizer, mesh: Mesh) -> Fed:
    if isinstance(config.stages[number].objective, Grpo):
        return OwnAnswers(config, number, tokenizer, mesh)
    return rows_of_stage(config, number, tokenizer, mesh)


def _teacher(config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh, teacher: Teacher) -> Params:
    """Its parameters as frozen ones are kept."""
    found = _find(teacher.start_from, None, teacher.model.compat)
    own = found.tokenizer
    if own is not None and tokenizer_digest(own) != tokenizer_digest(tokenizer):
        raise InputError(
            f"teacher {teacher.start_from!r}: its tokenizer is not the model's; take a teacher of "
            "the same family"
        )
    if found.config != teacher.model:
        raise InputError(
            f"start_from {teacher.start_from!r} of a teacher: it is not the model that the config "
            "says it is; give weights of that, or change the teacher's `model`"
        )
    dtype = jnp.float32 if config.params == "float32" else jnp.bfloat16
    params = _params(found, mesh, dtype, config.seed)
    with jax.set_mesh(mesh):
        return jax.jit(partial(frozen_as, config.params))(params)


def mesh_of(config: TrainConfig) -> Mesh:
    """That of a run on the devices that are here."""
    devices = jax.device_count()
    return make_mesh(config.mesh or mesh_for(config.model, jax.default_backend(), devices))


def _beginning(config: TrainConfig, mesh: Mesh) -> Model:
    """Where the first stage starts; without parameters if those are random, or it has begun."""
    model = config.model
    if config.start_from is None:
        tokenizer = Tokenizer.from_file(config.tokenizer) if config.tokenizer else None
        tokenizer = tokenizer or _bytes_tokenizer(model)
        return Model(model, None, _fitting(tokenizer, model, str(config.tokenizer)), mesh)
    found = _find(config.start_from, config.tokenizer, model.compat)
    unranked = replace(model, reward_head=False)
    known = (each for base in (model, unranked) for each in (base, base.without_lora()))
    if not (found.config in known or is_trunk(found.config, model)):
        raise InputError(
            f"start_from {config.start_from!r} of the run: it is neither the model of the config "
            "nor the text model which that is built on, with LoRA and reward head or without; give "
            "weights of one of them, or change `model`"
        )
    trunk = _trunk(config)
    tokenizer = _fitting(found.tokenizer, model, str(config.start_from))
    if Steps(stage_directory(config, 0)).all():
        return Model(model, None, tokenizer, mesh)
    known = _known(found, model, mesh, config.seed)
    if trunk is not None:
        known = overlaid(known, _known(trunk, model, mesh, config.seed))
    return Model(model, _completed(known, config, mesh), tokenizer, mesh)


def _trunk(config: TrainConfig) -> _Found | None:
    """The text model whose weights the language model gets."""
    if config.trunk_from is None:
        return None
    found = _find(config.trunk_from, config.tokenizer, config.model.compat)
    if not is_trunk(found.config, config.model):
        raise InputError(
            f"trunk_from {config.trunk_from!r} of the run: it is not the text model which the "
            "config's is built on; give weights of that, or leave it out"
        )
    return found


def _known(found: _Found, config: LlamaConfig, mesh: Mesh, seed: int) -> Slices:
    """What a model has of the config's parameters, which may be all of them."""
    slices = found.slices or Slices.of(_params(found, mesh, jnp.float32, seed))
    if is_trunk(found.config, config):
        return graft(slices, found.config, config)
    return slices


def _completed(known: Slices, config: TrainConfig, mesh: Mesh) -> Params:
    """What is known of the parameters, where it is to be, and the rest random, by the seed.

    Float32, but for matrices that `begin_stage` would make smaller at once: there may be no room.
    """
    model, is_trainable = config.model, trains(config.stages[0].trains, config.model)

    def target(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = path_name(path)
        small = config.params != "float32" and is_projection(name) and not is_trainable(name)
        return leaf.update(dtype=jnp.bfloat16) if small else leaf

    def fresh(key: Array) -> Params:
        return partition(init_params(model, key), is_known)[1]

    is_known = known.shapes.__contains__
    with jax.set_mesh(mesh):
        targets, lacking = partition(on_mesh(abstract_params(model), mesh), is_known)
        rest = jax.jit(fresh)(jax.random.key(config.seed)) if jax.tree.leaves(lacking) else lacking
    return combine(load_slices(known, jax.tree.map_with_path(target, targets)), rest)


def _bytes_tokenizer(config: LlamaConfig) -> Tokenizer | None:
    """For tiny models, the tokenizer that needs no file."""
    tokenizer = Tokenizer.bytes_only()
    return tokenizer if tokenizer.num_tokens == config.decoder.vocab_size else None
