"""How full packed rows are, and what that is worth in training.

    python -m benchmarks.data_packing
    python -m benchmarks.data_packing --documents 5000 --steps 5

Documents have lengths as those of a pretraining mixture: captions of one image (70 %), interleaved
documents of two to five (10 %), conversations about one (12 %) and plain text (8 %); images have
one to four tiles. Fill is measured with rows of 4,096 and 8,192 tokens (32 and 64 rows open).

Training is measured on a small vision model whose rows are an eighth as long, on documents shrunk
alike: packed rows; rows of one document each, padded to the longest document of all; and the same,
padded to the longest document of the batch, in text, images and tiles (a compiled shape for each
batch; compiling is not in the times). They take turns in one run; the unit is documents a second.

Prints tables and a line of JSON.
"""

import argparse
import json
import platform
import time
from functools import partial
from itertools import cycle

import grain
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tables import print_table
from l32jax.config import DecoderConfig, VisionConfig
from l32jax.data.batches import place
from l32jax.data.packing import RowShape, fit, pack
from l32jax.data.rows import Batch, VisionShape, make_row, stack
from l32jax.data.samples import Document, Sample
from l32jax.presets import LLAMA3_2_11B_VISION, LlamaConfig, with_vision
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig
from l32jax.sharding import single_device_mesh
from l32jax.train.objectives import next_token
from l32jax.train.step import init_state, make_train_step

TILES = {1: 0.15, 2: 0.25, 3: 0.10, 4: 0.50}  # of an image, and how often
GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}
# What of a document: its share, images, and the median, spread and bounds of its words.
KINDS = (
    (0.70, (1, 1), (45, 0.7, 8, 400)),
    (0.10, (2, 5), (500, 0.6, 60, 2000)),
    (0.12, (1, 1), (250, 0.7, 40, 1500)),
    (0.08, (0, 0), (500, 0.8, 30, 4000)),
)
SHRINK = 8
ROW_SHAPES = {4096: (28, 77, 32), 8192: (55, 154, 64)}  # tokens: images, tiles, open rows
BATCHES = 6  # that documents alone come in: each may be a shape to compile
WORDS = 200  # of the small model's vocabulary

SMALL = with_vision(
    LlamaConfig(
        decoder=DecoderConfig(
            vocab_size=256,
            embed_dim=128,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_dim=384,
            num_groups=4,
        )
    ),
    VisionConfig(
        image_size=28,
        embed_dim=64,
        num_heads=2,
        mlp_dim=128,
        num_local_layers=2,
        num_global_layers=1,
        taps=(1,),
    ),
)


def draw_document(rng: np.random.Generator, image_id: int, tile_size: int, shrink: int) -> Sample:
    """Images first, then words; pictures are black, of just so many tiles."""
    kind = rng.choice(len(KINDS), p=[share for share, *_ in KINDS])
    _, (fewest, most), (median, spread, low, high) = KINDS[kind]
    words = int(np.clip(rng.lognormal(np.log(median), spread), low, high)) // shrink + 1
    images = []
    for _ in range(rng.integers(fewest, most + 1)):
        rows, columns = GRIDS[int(rng.choice(list(TILES), p=list(TILES.values())))]
        images.append(np.zeros((rows * tile_size, columns * tile_size, 3), np.uint8))
    tokens = [1, *[image_id] * len(images), *rng.integers(2, WORDS, words).tolist()]
    weights = [float(token not in (1, image_id)) for token in tokens]
    return Sample((Document(tokens, weights, tuple(range(len(images)))),), tuple(images))


def packed_rows(samples: list[Sample], shape: RowShape, open_rows: int) -> list[list[Sample]]:
    rng = np.random.default_rng(0)
    pieces = [piece for sample in samples for piece in fit(sample, shape, rng)]
    elements = grain.MapDataset.source([{"sample": piece, "bad": []} for piece in pieces])
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    rows = pack(
        elements.to_iter_dataset(reading), shape, packing="best_fit", open_rows=open_rows, seed=0
    )
    return [row["sample"] for row in rows]


def fill(rows: list[list[Sample]], shape: RowShape) -> dict[str, float]:
    used = np.array([np.sum([shape.size_of(s) for s in row], axis=0) for row in rows])
    shares = used.mean(axis=0) / shape.size
    return dict(zip(("text", "images", "tiles"), map(float, shares), strict=True))


def measure_fill(count: int) -> list[dict]:
    model = LLAMA3_2_11B_VISION
    assert model.vision is not None
    found = []
    for length, (images, tiles, open_rows) in ROW_SHAPES.items():
        rng = np.random.default_rng(0)
        samples = [draw_document(rng, model.decoder.vocab_size, 448, 1) for _ in range(count)]
        vision = VisionShape.of(model, max_images=images, max_tiles=4, slots=tiles)
        shape = RowShape(length=length, vision=vision)
        rows = packed_rows(samples, shape, open_rows)
        full = rows[: max(len(rows) - open_rows, 1)]  # an endless stream has no last, emptier ones
        found.append({"row": shape.size, "rows": len(full), **fill(full, shape)})
    return found


class Contestant:
    """Documents laid out in one way, and the seconds that training on them took."""

    def __init__(self, name: str, batches: list[list[list[Sample]]], shapes: list[RowShape]):
        self.name, self.seconds, self.documents = name, [], 0
        self.steps = 0
        made = [
            stack([make_row(row, length=shape.length, vision=shape.vision) for row in rows])
            for rows, shape in zip(batches, shapes, strict=True)
        ]
        self._mesh = single_device_mesh()
        self._sizes = [sum(len(row) for row in rows) for rows in batches]
        self._batches: list[Batch] = made
        self.padding = float(np.mean([(batch["stop"] == 0).mean() for batch in made]))
        self._turn = cycle(range(len(made)))

    def warm_up(self, step, state):
        for batch in {b["tokens"].shape + b["tiles"].shape: b for b in self._batches}.values():
            state, metrics = step(state, place(batch, self._mesh), jnp.float32(1e-4))
            jax.block_until_ready(metrics)
        return state

    def take_turn(self, step, state):
        index = next(self._turn)
        batch = place(self._batches[index], self._mesh)
        begin = time.perf_counter()
        state, metrics = step(state, batch, jnp.float32(1e-4))
        jax.block_until_ready(metrics)
        self.seconds.append(time.perf_counter() - begin)
        self.documents += self._sizes[index]
        self.steps += 1
        return state

    @property
    def speed(self) -> float:
        return self.documents / sum(self.seconds)


def contestants(count: int, batch_size: int) -> list[Contestant]:
    rng = np.random.default_rng(1)
    assert SMALL.vision is not None
    length, images, tiles = 4096 // SHRINK, 28, 77
    samples = [draw_document(rng, SMALL.decoder.vocab_size, 28, SHRINK) for _ in range(count)]

    def shape(length: int, images: int, tiles: int) -> RowShape:
        vision = VisionShape.of(SMALL, max_images=images, max_tiles=4, slots=tiles)
        return RowShape(length=length, vision=vision)

    whole = shape(length, images, tiles)
    rows = packed_rows(samples, whole, 32)
    packed = [rows[i : i + batch_size] for i in range(0, len(rows) - batch_size, batch_size)]
    # A batch of single documents holds as many as a batch of packed rows does on average.
    per_batch = round(count / len(rows) * batch_size)
    groups = [samples[i : i + per_batch] for i in range(0, count - per_batch, per_batch)][:BATCHES]
    alone = [[[sample] for sample in group] for group in groups]
    most = max(len(sample.images) for sample in samples)
    longest = max(shape(1, most, 4 * most).size_of(sample).text for sample in samples)
    padded = shape(longest, most, 4 * most)
    fitted = []
    for group in groups:
        sizes = np.max([padded.size_of(sample) for sample in group], axis=0)
        fitted.append(shape(*map(int, sizes)))
    return [
        Contestant("packed", packed, [whole] * len(packed)),
        Contestant("padded to the longest of the batch", alone, fitted),
        Contestant("padded to the longest of all", alone, [padded] * len(alone)),
    ]


def measure_training(count: int, batch_size: int, steps: int) -> list[dict]:
    stage = StageConfig(
        name="benchmark",
        num_steps=1,
        trains=("vision_tower", "adapter"),
        data=DataConfig(mixture=(("none.jsonl", 1.0),), batch_size=batch_size, length=1),
        optimizer=OptimizerConfig(peak_lr=1e-4),
    )
    mesh = single_device_mesh()
    runners = contestants(count, batch_size)
    with jax.set_mesh(mesh):
        step = make_train_step(SMALL, stage, partial(next_token, dtype=jnp.float32))
        state = jax.jit(partial(init_state, SMALL, stage, 0))()
        for runner in runners:
            state = runner.warm_up(step, state)
        for _ in range(steps):
            for runner in runners:
                state = runner.take_turn(step, state)
    return [
        {
            "rows": runner.name,
            "documents_per_s": round(runner.speed, 1),
            "padding": round(runner.padding, 3),
            "packed_is_faster_by": round(runners[0].speed / runner.speed, 2),
        }
        for runner in runners
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=20_000, help="to measure fill with")
    parser.add_argument("--rows", type=int, default=4, help="of a packed batch in training")
    parser.add_argument("--steps", type=int, default=10, help="timed, of each kind of rows")
    options = parser.parse_args()
    filled = measure_fill(options.documents)
    print_table(
        [{k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()} for r in filled]
    )
    trained = measure_training(1200, options.rows, options.steps)
    print_table(trained)
    where = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    print(json.dumps({"fill": filled, "training": trained} | where))


if __name__ == "__main__":
    main()
