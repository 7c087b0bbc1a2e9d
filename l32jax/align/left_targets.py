"""What models say of the tokens of sources, written once beside them, to be learned from later.

Samples are cut into pieces that fit a row, as training would cut them, laid out in rows, and
scored; each piece is then written with what was said of its tokens. So it comes back with them,
whatever row it is packed into, and images and documents are read once for both.

A unit of some hundred records is a shard in the end. Units that are done are kept: whoever starts
it again goes on, and several processes may share the units.
"""

import dataclasses
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from l32jax.align.left_unit import Numbered, Scored, scored_samples, scorer, summary
from l32jax.align.sampling import fingerprint
from l32jax.checkpoint.engine import locks
from l32jax.config_text import to_json
from l32jax.data.beside import Beside
from l32jax.data.beside_packed import LogKind
from l32jax.data.packing import RowShape
from l32jax.data.records import Bad
from l32jax.data.samples import Sample
from l32jax.data.shard_file import Shard, write_shard
from l32jax.data.shards import (
    INDEX,
    encode_sample,
    read_index,
    require_same,
    shard_name,
    tokenizer_digest,
    write_index,
)
from l32jax.data.sources.mixture import open_sources, row_shape
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.generate.model import Model
from l32jax.objective_config import Distill, Teacher, tiles_of
from l32jax.run_config import DataConfig
from l32jax.sharding import row_parts
from l32jax.train.progress import told

UNIT = 256  # records


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftConfig:
    """From sources to a folder of samples with what models say of them.

    data: its mixture names the sources, read once each; its rows are what models see at once.
    teachers: models in any format with their weights, as one mixture.
    top_k: how many of its likeliest words; 0 leaves the log-probabilities of the tokens alone.
    temperature: of the probabilities of these words.
    logs: in which they are kept.
    part: (number from 0, of how many) of the units are done here.
    """

    data: DataConfig
    output: str
    teachers: tuple[tuple[str, float], ...]
    top_k: int = 64
    temperature: float = 1.0
    logs: LogKind = "bfloat16"
    part: tuple[int, int] = (0, 1)

    def __post_init__(self):
        if self.top_k < 0 or not self.teachers:
            raise InputError(
                f"top_k={self.top_k} of {len(self.teachers)} teachers: give none below 0, and a "
                "teacher"
            )
        if self.data.length < 2:
            raise InputError("length=1 of rows: nothing is said of a first token; give 2 at least")
        number, parts = self.part
        if not 0 <= number < parts:
            raise InputError(f"part {number} of {parts}: parts are counted from 0")


def leave_targets(config: LeftConfig, models: Sequence[Model]) -> dict[str, Any] | None:
    """Writes `config.output`; the content of its index, or None while other parts lack units.

    Args:
      models: the config's teachers; they are on one mesh, whose devices share rows.
    Raises:
      InputError: the output is of other models or sources, the models are of several families, or
        more than a hundredth of the records is unusable.
    """
    output, tokenizer = Path(config.output), _tokenizer(config, models)
    shape, score = _row_shape(config, models), _scorer(config, models)
    sources = open_sources(config.data, tokenizer)
    about = _about(config, models, [len(source) for source in sources])
    if (output / INDEX).exists():
        return require_same(read_index(output), about, output)
    units, folder = list(_units(sources)), output / "unfinished"
    number, parts = config.part
    with locks.take(folder / f"part-{number}", f"part {number} of {str(output)!r}"):
        _begin(folder, about)
        mine = range(number, len(units), parts)
        todo = [unit for unit in mine if not _is_done(output, folder, unit, len(units))]
        with told("records scored", sum(len(units[unit]) for unit in todo)) as advance:
            for unit in todo:
                found = scored_samples(units[unit], shape, config.data.batch_size, score)
                _write(folder, unit, found, config.logs)
                advance(len(units[unit]))
    return _finish(output, folder, len(units), about)


def _tokenizer(config: LeftConfig, models: Sequence[Model]) -> Tokenizer:
    """That which the models have in common."""
    tokenizers = [model.require_tokenizer() for model in models]
    if len({tokenizer_digest(tokenizer) for tokenizer in tokenizers}) > 1:
        raise InputError(
            f"teachers {', '.join(path for path, _ in config.teachers)}: their tokenizers differ; "
            "give models of one family"
        )
    if (words := models[0].config.decoder.vocab_size) < config.top_k:
        raise InputError(f"top_k={config.top_k}: the teachers know {words} words; give fewer")
    if config.data.batch_size % (devices := row_parts(models[0].mesh.shape)):
        raise InputError(
            f"{config.data.batch_size} rows at a time: {devices} devices share them; give a "
            "multiple"
        )
    return tokenizers[0]


def _row_shape(config: LeftConfig, models: Sequence[Model]) -> RowShape:
    """That which the models have in common."""
    shapes = [row_shape(config.data, model.config) for model in models]
    if len({shape.vision and tiles_of(shape.vision.encoder) for shape in shapes}) > 1:
        raise InputError(
            f"teachers {', '.join(path for path, _ in config.teachers)}: their tiles differ in "
            "size or number; give models of one family"
        )
    return dataclasses.replace(shapes[0], beside=Beside(pairs=config.data.max_pairs))


def _about(config: LeftConfig, models: Sequence[Model], lengths: Sequence[int]) -> dict[str, Any]:
    """What the index says; what decides about the output is in it."""
    settings = json.loads(to_json(config))
    for name in ("output", "part"):
        del settings[name]
    names = [name for name, _ in config.data.mixture]
    return {
        "sources": [list(pair) for pair in zip(names, lengths, strict=True)],
        "targets": {"top_k": config.top_k, "temperature": config.temperature},
        "config": settings,
        "teachers": [fingerprint(model.params) for model in models],
        "tokenizer": tokenizer_digest(models[0].require_tokenizer()),
    }


def _begin(folder: Path, about: dict[str, Any]) -> None:
    begun = folder / "begun.json"
    if begun.exists():
        require_same(json.loads(begun.read_text(encoding="utf-8")), about, folder.parent)
        return
    unfinished = folder / f"begun.{uuid.uuid4().hex}.unfinished"
    unfinished.write_text(json.dumps(about), encoding="utf-8")
    unfinished.replace(begun)


def _units(sources: Sequence[Sequence[Sample | Bad]]) -> Iterator[list[Numbered]]:
    for source in sources:
        for start in range(0, len(source), UNIT):
            yield [(source, number) for number in range(start, min(start + UNIT, len(source)))]


def _unit(folder: Path, number: int, kind: str = "arrayrecord") -> Path:
    """Its samples; or, written before them, "json": of its learned tokens, how they were scored."""
    return folder / f"unit-{number:06}.{kind}"


def _is_done(output: Path, folder: Path, number: int, units: int) -> bool:
    """Whether a unit is there, as itself or, if that was stopped at the very end, as a shard."""
    return _unit(folder, number).exists() or (output / shard_name(number, units)).exists()


def _scorer(config: LeftConfig, models: Sequence[Model]) -> Scored:
    named = zip(models, config.teachers, strict=True)
    teachers = (Teacher(model=m.config, start_from=p, weight=w) for m, (p, w) in named)
    how = Distill(teachers=tuple(teachers), temperature=config.temperature)
    return scorer(models, how, config.top_k)


def _write(folder: Path, number: int, samples: Sequence[Sample], logs: LogKind) -> None:
    _unit(folder, number, "json").write_text(json.dumps(summary(samples)))
    unfinished = _unit(folder, number, "unfinished")
    write_shard(unfinished, (encode_sample(sample, logs=logs) for sample in samples))
    unfinished.replace(_unit(folder, number))


def _finish(output: Path, folder: Path, units: int, about: dict[str, Any]) -> dict[str, Any] | None:
    """The index, which the first of the parts that find all units done writes."""
    if not all(_is_done(output, folder, number, units) for number in range(units)):
        return None
    with locks.take(folder / "end", f"end of {str(output)!r}", wait=True):
        if not (output / INDEX).exists():
            _end(output, folder, units, about)
        shutil.rmtree(folder, ignore_errors=True)  # which another part may be doing
    return read_index(output)


def _end(output: Path, folder: Path, units: int, about: dict[str, Any]) -> None:
    sums = [json.loads(_unit(folder, number, "json").read_bytes()) for number in range(units)]
    total = {name: sum(each[name] for each in sums) for name in sums[0]}
    shards = [output / shard_name(number, units) for number in range(units)]
    for number, shard in enumerate(shards):
        if not shard.exists():
            _unit(folder, number).replace(shard)
    known = {name: value for name, value in about.items() if name != "tokenizer"}
    known["learned_tokens"] = total["tokens"]
    known["cross_entropy"] = -total["log_probability"] / max(total["tokens"], 1)
    known["teacher_mass"] = total["mass"] / max(total["tokens"], 1)
    counts = [len(Shard(shard)) for shard in shards]
    write_index(output, tokenizer=about["tokenizer"], records=counts, about=known)
