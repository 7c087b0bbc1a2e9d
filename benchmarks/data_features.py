"""What features computed once are worth in training the adapter alone, beside encoding every step.

    python -m benchmarks.data_features
    python -m benchmarks.data_features --steps 30 --rows 4

A small model whose image encoder has about the share of a step's operations that it has in 11B:
of a row of 4,096 tokens with 28 images, by the same arithmetic (`train.flops`), which is printed.
Captions of one to three JPEG pictures are packed into rows. Both kinds of training take turns in
one run, each with the making of its rows: decoding pictures, or reading features from the disk
(from its cache, rather: they were just written). The time of computing them once is beside it.

Prints a table and a line of JSON.
"""

import argparse
import io
import json
import platform
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from l32jax.config import DecoderConfig, LlamaConfig, VisionConfig
from l32jax.data.batches import make_batches, place
from l32jax.data.features import Features
from l32jax.data.packing import RowShape
from l32jax.data.rows import VisionShape
from l32jax.data.sources.open import open_source
from l32jax.data.streams import Rows
from l32jax.data.tokenizer import Tokenizer
from l32jax.presets import LLAMA3_2_11B_VISION, with_vision
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.sharding import single_device_mesh
from l32jax.train.features import compute_features
from l32jax.train.flops import Counts, step_flops
from l32jax.train.objectives import next_token
from l32jax.train.step import init_state, make_train_step

LENGTH, IMAGES, TILES = 512, 8, 20  # of a row
SMALL = with_vision(
    LlamaConfig(
        decoder=DecoderConfig(
            vocab_size=512,
            embed_dim=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=768,
            num_groups=8,
        )
    ),
    VisionConfig(
        image_size=112,
        embed_dim=128,
        num_heads=4,
        mlp_dim=512,
        num_local_layers=16,
        num_global_layers=4,
        taps=(3, 11),
    ),
)


def write_captions(folder: Path, count: int) -> str:
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = rng.integers(80, 400, 2)
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((int(width), int(height))).save(file, "JPEG")
        (folder / f"{number}.jpg").write_bytes(file.getvalue())
    with (folder / "captions.jsonl").open("w") as file:
        for number in range(count):
            pictures = [{"image": f"{(number + n) % count}.jpg"} for n in range(1 + number % 3)]
            words = "what is to be seen here, " * int(rng.integers(2, 6))
            file.write(json.dumps({"parts": [*pictures, words]}) + "\n")
    return str(folder / "captions.jsonl")


def share_of_encoder(model: LlamaConfig, length: int, images: int, tiles: int) -> float:
    """Of the operations of a step that trains the adapter."""
    counts = Counts(slots=length, image_slots=images, tile_slots=tiles)
    flops = step_flops(model, ("adapter",), counts)
    return flops["vision_tower"].done / sum(part.done for part in flops.values())


def make_config(source: str, folder: Path, rows: int) -> TrainConfig:
    stage = StageConfig(
        name="benchmark",
        num_steps=1,
        trains=("adapter",),
        data=DataConfig(
            mixture=((source, 1.0),),
            batch_size=rows,
            length=LENGTH,
            max_images=IMAGES,
            vision_tiles=TILES,
            features=str(folder / "features"),
        ),
        optimizer=OptimizerConfig(peak_lr=1e-4),
    )
    return TrainConfig(model=SMALL, stages=(stage,), directory=str(folder))


class Contestant:
    """Batches made in one way, and the seconds of steps on them."""

    def __init__(self, name: str, config: TrainConfig, features: Features | None):
        self.name, self.seconds, self.losses = name, [], []
        data = config.stages[0].data
        vision = VisionShape.of(
            SMALL, max_images=data.max_images, max_tiles=data.max_tiles, slots=data.vision_tiles
        )
        source = open_source(data.mixture[0][0], Tokenizer.bytes_only(), with_images=True)
        rows = Rows(shape=RowShape(length=data.length, vision=vision), features=features)
        self.batches = make_batches([source], [1.0], rows, batch_size=data.batch_size, seed=0)

    def take_turn(self, step, state, mesh):
        begin = time.perf_counter()
        batch = place(next(self.batches), mesh)
        state, metrics = step(state, batch, jnp.float32(0))  # so both see the same parameters
        self.losses.append(float(metrics["loss"]))
        self.seconds.append(time.perf_counter() - begin)
        return state


def measure(folder: Path, rows: int, steps: int, pictures: int) -> dict:
    config = make_config(write_captions(folder, pictures), folder, rows)
    stage, mesh = config.stages[0], single_device_mesh()
    with jax.set_mesh(mesh):
        state = jax.jit(partial(init_state, SMALL, stage, 0))()
        begin = time.perf_counter()
        compute_features(
            config, stage, Tokenizer.bytes_only(), state.params, mesh, stops=lambda: False
        )
        once = time.perf_counter() - begin
        runners = [
            Contestant("encoded every step", config, None),
            Contestant("computed once", config, Features(folder / "features")),
        ]
        step = make_train_step(SMALL, stage, partial(next_token, dtype=jnp.float32))
        for _ in range(steps + 1):
            for runner in runners:
                state = runner.take_turn(step, state, mesh)
    for runner in runners:
        runner.batches.close()
    plain, kept = runners
    np.testing.assert_allclose(kept.losses, plain.losses, atol=1e-5, rtol=0)
    medians = [float(np.median(runner.seconds[1:])) for runner in runners]  # the first compiles
    return {
        "encoded_every_step_s": round(medians[0], 4),
        "computed_once_s": round(medians[1], 4),
        "faster_by": round(medians[0] / medians[1], 2),
        "computing_once_s": round(once, 2),
        "steps_until_it_pays": round(once / (medians[0] - medians[1]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--steps", type=int, default=20, help="timed, of each kind")
    parser.add_argument("--pictures", type=int, default=96)
    options = parser.parse_args()
    found = {
        "encoder_share_11b": round(share_of_encoder(LLAMA3_2_11B_VISION, 4096, 28, 77), 3),
        "encoder_share": round(share_of_encoder(SMALL, LENGTH, IMAGES, TILES), 3),
    }
    with tempfile.TemporaryDirectory() as folder:
        found |= measure(Path(folder), options.rows, options.steps, options.pictures)
    for name, value in found.items():
        print(f"{name:24}{value}")
    where = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
    print(json.dumps(found | where))


if __name__ == "__main__":
    main()
