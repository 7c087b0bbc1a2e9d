"""Computing the image features of a stage that does not train the encoder, before it begins."""

import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, Shaped

from l32jax.checkpoint.engine import locks
from l32jax.config import LlamaConfig
from l32jax.config_text import to_json
from l32jax.data.batches import own_rows, place
from l32jax.data.feature_parts import UNIT, Kind, Part, Unit
from l32jax.data.features import Features, image_key, list_images, part_of, require_kind, write_kind
from l32jax.data.images import Grid, preprocess
from l32jax.data.records import Bad
from l32jax.data.samples import Sample
from l32jax.data.sources.open import open_source
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError, one_line
from l32jax.model.llama import Images, bind
from l32jax.model.parameters import Params, flatten, is_stacked
from l32jax.run_config import StageConfig, TrainConfig
from l32jax.sharding import row_parts
from l32jax.train.progress import told

Source = Sequence[Sample | Bad]
NOTHING = Unit(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 0, 0)), (), {})

THREADS = 8  # that decode
ASKED_SECONDS = 1.0  # between looks whether the first process has listed the images


class Stopped(Exception):
    """It was asked to stop; what is done is kept."""


class Decoded(NamedTuple):
    tiles: Shaped[np.ndarray, "c 3 y x"]
    grid: Grid


def compute_features(
    config: TrainConfig,
    stage: StageConfig,
    tokenizer: Tokenizer,
    params: Params,
    mesh: Mesh,
    *,
    stops: Callable[[], bool],
) -> None:
    """Fills the stage's folder of features with those of its sources' images that it lacks.

    What is done is kept, whatever ends it. Run it under the mesh, in every process.

    Args:
      config: whose model is that of the stage.
      stops: whether to stop, asked while images are listed, and after each unit.
    Raises:
      Stopped: in all processes, when `stops` said so.
      InputError: the folder has features of another encoder, another process is at work there, or
        the disk has no room for all.
    """
    assert stage.data.features is not None
    folder = Path(stage.data.features)
    kind = kind_of(config, stage, params)
    require_kind(folder, kind)
    names = dict.fromkeys(name for name, _ in stage.data.mixture)
    opened = {name: open_source(name, tokenizer, with_images=True) for name in names}
    sources = {part_of(folder, name, source, kind): source for name, source in opened.items()}
    with ExitStack() as until_done:
        if jax.process_index() == 0:
            until_done.enter_context(locks.take(folder, f"features in {str(folder)!r}"))
            write_kind(folder, kind)
            _begin_parts(sources, kind, stops)
        _await_parts(sources, stops)
        parts = [Part(each, kind) for each in sources]
        _require_room(folder, kind, parts)
        encoder = Encoder(config, params, mesh, kind)
        for part, source in zip(parts, sources.values(), strict=True):
            _compute_part(folder, part, source, encoder, stops)


def kind_of(config: TrainConfig, stage: StageConfig, params: Params) -> Kind:
    """Of the features that a stage's encoder computes."""
    vision = config.model.vision
    assert vision is not None
    return Kind(
        encoder=encoder_digest(config.model, params),
        image_size=vision.image_size,
        max_tiles=stage.data.max_tiles,
        tokens=vision.tokens_per_tile,
        width=vision.feature_dim,
        dtype=config.dtype,
    )


def encoder_digest(model: LlamaConfig, params: Params) -> str:
    """SHA-256 of an image encoder's parameters, in their dtypes, and of its configuration."""
    architecture = f"{to_json(model.vision)} {model.compat.vision_intermediates}"
    found = hashlib.sha256(architecture.encode())
    for path, leaf in sorted(flatten(params).items()):
        if path.startswith("vision/"):
            found.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
            layers = leaf if is_stacked(path) else leaf[None]
            for layer in range(len(layers)):
                found.update(np.asarray(_everywhere(layers, layer)).tobytes())
    return found.hexdigest()


@jax.jit
def _everywhere(layers: Array, index: Int[Array, ""] | int) -> Array:
    """One layer, which every device has for a moment."""
    return jax.sharding.reshard(layers[index], PartitionSpec())


def _begin_parts(sources: dict[Path, Source], kind: Kind, stops: Callable[[], bool]) -> None:
    for folder, source in sources.items():
        if Part.is_begun(folder):
            continue
        with told("records looked through", len(source)) as advance:

            def go_on(records: int, advance=advance) -> None:
                advance(records)
                if stops():
                    raise Stopped

            Part.begin(folder, list_images(source, kind, advance=go_on))


def _await_parts(folders: Iterable[Path], stops: Callable[[], bool]) -> None:
    """By looking: a barrier might lose its patience while the first process lists the images."""
    for folder in folders:
        while not Part.is_begun(folder):
            if stops():
                raise Stopped
            time.sleep(ASKED_SECONDS)


def _require_room(folder: Path, kind: Kind, parts: Sequence[Part]) -> None:
    """Tells how much is to be stored; InputError if there is no room for it."""
    todo = [part.images[~np.repeat(part.done, UNIT)[: len(part.images)]] for part in parts]
    keys, first = np.unique(np.concatenate([each["key"] for each in todo]), return_index=True)
    todo = np.concatenate(todo)[first][~Features(folder).has(keys)]
    tiles = int((todo["rows"].astype(int) * todo["columns"]).sum())
    free = shutil.disk_usage(folder).free
    images, tiles, free = map(int, _agreed(np.array([len(todo), tiles, free])))
    needed = tiles * kind.tile_bytes
    if images and jax.process_index() == 0:
        text = (
            f"vision features of {images:,} images, {tiles:,} tiles: {_size(needed)}, "
            f"{_size(needed / images)} an image, in {folder} ({_size(free)} free)"
        )
        print(text, file=sys.stderr)
    if needed > free:
        raise InputError(
            f"features in {str(folder)!r}: they need {_size(needed)} and {_size(free)} are free; "
            "make room, or name another folder"
        )


def _size(number: float | int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.4g} TB"


def _agreed(array: np.ndarray) -> np.ndarray:
    """What the first process has; as bytes, for of 64 bits JAX would take 32."""
    sent = np.frombuffer(array.tobytes(), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return np.frombuffer(received.tobytes(), array.dtype).reshape(array.shape)


def _compute_part(
    folder: Path, part: Part, source: Source, encoder: "Encoder", stops: Callable[[], bool]
) -> None:
    """The processes take units in turn, and as many steps for them."""
    multihost_utils.sync_global_devices("the parts before are done")
    units = np.flatnonzero(~_agreed(part.done)).tolist()
    lacking = ~_agreed(Features(folder).has(part.images["key"]))
    images = [np.flatnonzero(lacking[n * UNIT : (n + 1) * UNIT]) for n in units]
    number, count = jax.process_index(), jax.process_count()
    decoded = _decoded(source, part, units[number::count], images[number::count], encoder.kind)
    with (
        told("images encoded", sum(map(len, images))) as advance,
        ThreadPoolExecutor(1) as writer,
    ):
        writing: Future | None = None
        for first in range(0, len(units), count):
            together = images[first : first + count]
            mine = next(decoded, {})
            unit = encoder(mine) if any(map(len, together)) else NOTHING
            _finish(writing, folder)
            writing = None
            if first + number < len(units):
                index = units[first + number]
                elsewhere = sorted(set(range(len(part.unit(index)))).difference(mine))
                writing = writer.submit(part.write, index, unit._replace(elsewhere=elsewhere))
            advance(sum(map(len, together)))
            if _agreed(np.array(stops())):
                raise Stopped
        _finish(writing, folder)


def _finish(writing: Future | None, folder: Path) -> None:
    try:
        if writing is not None:
            writing.result()
    except OSError as error:
        raise InputError(
            f"features in {str(folder)!r}: {one_line(error)}; make room and start again, what is "
            "done is kept"
        ) from None


def _decoded(
    source: Source, part: Part, units: Sequence[int], images: Sequence[np.ndarray], kind: Kind
) -> Iterator[dict[int, Decoded | str]]:
    """Of each unit its images by number, or what is wrong with them; the next is under way."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: list[dict[int, Future]] = []
        for unit, numbers in zip(units, images, strict=True):
            entries = part.unit(unit)
            waiting.append(
                {n: pool.submit(_decode, source, entries[n], kind) for n in numbers.tolist()}
            )
            if len(waiting) > 1:
                yield {n: future.result() for n, future in waiting.pop(0).items()}
        for rest in waiting:
            yield {n: future.result() for n, future in rest.items()}


def _decode(source: Source, entry: Any, kind: Kind) -> Decoded | str:
    sample, number = source[int(entry["record"])], int(entry["number"])
    if isinstance(sample, Bad) or number >= len(sample.images):
        return "image of a source: it has gone since the images were listed"
    image = sample.images[number]
    try:
        if image_key(image).rstrip(b"\0") != entry["key"]:
            return "image of a source: it has changed since the images were listed"
        found = Decoded(*preprocess(image, tile_size=kind.image_size, max_tiles=kind.max_tiles))
    except InputError as error:
        return str(error)
    if found.grid != (int(entry["rows"]), int(entry["columns"])):
        return "image of a source: its size is not what its header says"
    return found


class Encoder:
    """A model's image encoder on a mesh, for all images of a unit at once."""

    def __init__(self, config: TrainConfig, params: Params, mesh: Mesh, kind: Kind):
        vision = config.model.vision
        assert vision is not None
        self.kind = kind
        self._params, self._mesh = params, mesh
        shards = row_parts(mesh.shape)
        each = max(shards // jax.process_count(), 1)  # of this a process has a multiple of rows
        self._shape = (-(-UNIT // each) * each, 1, vision.max_tiles, 3, *[vision.image_size] * 2)

        @jax.jit
        def encode(params: Params, batch: dict[str, Array]) -> Array:
            images = Images.of(batch)
            assert images is not None
            images = images.normalised(jnp.dtype(config.dtype))
            return bind(config.model, params).features(images, config.attention)[:, 0]

        self._encode = encode

    def __call__(self, images: Mapping[int, Decoded | str]) -> Unit:
        """The features of a unit's images by number; `elsewhere` is left to be told."""
        good = {n: each for n, each in images.items() if isinstance(each, Decoded)}
        tiles = np.zeros(self._shape, np.uint8)
        aspect = np.zeros((len(tiles), 1, 2), np.int32)
        for row, each in enumerate(good.values()):
            tiles[row, 0, : len(each.tiles)] = each.tiles
            aspect[row, 0] = each.grid
        none = np.zeros((len(tiles), 0), np.int32)
        batch = place({"tiles": tiles, "aspect": aspect, "tile_index": none}, self._mesh)
        features = own_rows(self._encode(self._params, batch))
        counts = aspect[: len(good), 0].prod(axis=1)
        row = np.repeat(np.arange(len(good)), counts)
        tile = np.concatenate([none[0], *map(np.arange, counts)])
        bad = {n: each for n, each in images.items() if isinstance(each, str)}
        return Unit(np.array(list(good), np.int32)[row], tile, features[row, tile], (), bad)
