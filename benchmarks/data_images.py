"""Encoded images to the encoder's tiles, beside Hugging Face's two image processors.

    python -m benchmarks.data_images
    python -m benchmarks.data_images --pictures 16 --rounds 3     # a quick look

One core each: CPU seconds of one thread, best of several rounds in which all take turns over the
same files. Pixels are compared first. The fast processor needs torchvision, of which only the
transforms: a build for another torch will do,

    pip install --no-deps --target /somewhere torchvision==0.28.0     # for torch 2.13
    PYTHONPATH=/somewhere python -m benchmarks.data_images

Prints a table and a line of JSON.
"""

import argparse
import io
import json
import os
import platform
import sys
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, features

from l32jax.config import CLIP_MEAN, CLIP_STD
from l32jax.data.images import choose_grid, fit, load_image, normalise, preprocess

# The transforms are Python over torch; these two want the compiled operators beside them.
for _name in ("_meta_registrations", "_autograd_registrations"):
    sys.modules[f"torchvision.{_name}"] = types.ModuleType(_name)
import torchvision  # noqa: E402
import transformers  # noqa: E402

TILE, BATCH = 560, 8
SHAPES = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
SHORTEST, LONGEST = 300, 2000  # of the long side

Contender = Callable[[bytes], object]


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise with the spectrum of photographs: as many bits a pixel as JPEG needs for those."""
    canvas, cell, weight = np.zeros((height, width, 3), np.float32), max(width, height) // 2, 1.0
    while cell >= 1:
        small = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        small = 0.85 * small.mean(axis=-1, keepdims=True) + 0.15 * small
        for channel in range(3):
            plane = Image.fromarray(np.ascontiguousarray(small[..., channel]))
            canvas[..., channel] += weight * np.asarray(plane.resize((width, height), 3))
        cell, weight = cell // 2, weight * 0.68
    canvas = (canvas - canvas.mean()) / canvas.std()
    return Image.fromarray((128 + 50 * canvas).clip(0, 255).astype(np.uint8))


def drawing(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Shapes and lines in plain colours, as charts and screenshots have them."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        points = rng.integers(0, (width, height), (2, 2))
        box = [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]
        colour = tuple(rng.integers(0, 256, 3).tolist())
        kind = rng.integers(3)
        if kind == 0:
            draw.rectangle([*box[:2], box[0] + (box[2] - box[0]) // 4, box[3]], fill=colour)
        elif kind == 1:
            draw.line(box, fill=colour, width=2)
        else:
            draw.text(box[:2], "the quick brown fox 0123456789", fill=colour, font_size=18)
    return image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_files(count: int, seed: int) -> list[bytes]:
    """Three JPEG photographs to a PNG drawing, of everyday shapes, long sides spread evenly."""
    rng = np.random.default_rng(seed)
    sides = np.geomspace(SHORTEST, LONGEST, count)
    found = []
    for index, side in enumerate(sides):
        across, down = SHAPES[rng.integers(len(SHAPES))]
        width, height = (round(side * part / max(across, down)) for part in (across, down))
        if index % 4 == 3:
            found.append(encoded(drawing(rng, width, height), "PNG"))
        else:
            quality = int(rng.integers(75, 96))
            found.append(encoded(photograph(rng, width, height), "JPEG", quality=quality))
    return found


def prepared(files: Sequence[bytes]) -> list[bytes]:
    """The same, resized once and for all to what the model sees."""
    found = []
    for data in files:
        image = opened(data)
        kind = image.format or "PNG"
        options = {"quality": 95} if kind == "JPEG" else {}
        small = resized_by_pillow(load_image(data))
        found.append(data if small.size == image.size else encoded(small, kind, **options))
    return found


def processors() -> tuple[Callable, Callable]:
    options = dict(
        size={"height": TILE, "width": TILE},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        max_image_tiles=4,
    )
    fast = transformers.MllamaImageProcessor(**options)
    pillow = transformers.models.mllama.image_processing_pil_mllama.MllamaImageProcessorPil(
        **options
    )
    return fast, pillow


def opened(item: bytes | Image.Image) -> Image.Image:
    return item if isinstance(item, Image.Image) else Image.open(io.BytesIO(item))


def resized_by_pillow(image: Image.Image) -> Image.Image:
    grid = choose_grid(image.height, image.width, tile_size=TILE, max_tiles=4)
    height, width = fit(image.height, image.width, grid, tile_size=TILE)
    same = image.size == (width, height)
    return image if same else image.resize((width, height), Image.Resampling.BILINEAR)


def ours(item: bytes | Image.Image) -> np.ndarray:
    return preprocess(item, tile_size=TILE)[0]


def compare(files: Sequence[bytes], fast: Callable, pillow: Callable) -> dict[str, float | bool]:
    """Ours must be the Pillow processor's pixels; the fast one rounds twice, with fewer bits."""
    steps = np.zeros(3, np.int64)  # values that are equal, one and two levels away
    for data in files:
        tiles = ours(data)
        floats = normalise(tiles)
        theirs = pillow([[opened(data)]], return_tensors="np")["pixel_values"][0, 0]
        assert np.abs(theirs[: len(tiles)] - floats).max() < 1e-6 and not theirs[len(tiles) :].any()
        quick = fast([[opened(data)]], return_tensors="pt")["pixel_values"][0, 0].numpy()
        gaps = np.abs(quick[: len(tiles)] - floats) * 255
        levels = np.rint(gaps * np.array(CLIP_STD, np.float32)[:, None, None]).astype(int)
        steps += np.bincount(levels.ravel(), minlength=3)
    off = {"one": steps[1] / steps.sum(), "two": steps[2] / steps.sum()}
    return {
        "equals_hf_pillow": True,
        **{f"fast_{n}_off": float(f"{share:.2g}") for n, share in off.items()},
    }


def fastest(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, all taking turns."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - begin)
    return best


def over(items: Sequence, function: Callable[..., object]) -> Callable[[], None]:
    def run() -> None:
        for item in items:
            function(item)

    return run


def one_by_one(items: Sequence[bytes | Image.Image], fast: Callable, pillow: Callable) -> dict:
    return {
        "ours, uint8": over(items, ours),
        "ours, normalised": over(items, lambda item: normalise(ours(item))),
        "HF fast": over(items, lambda item: fast([[opened(item)]], return_tensors="pt")),
        "HF Pillow": over(items, lambda item: pillow([[opened(item)]], return_tensors="np")),
    }


def in_batches(files: Sequence[bytes], fast: Callable, pillow: Callable) -> dict:
    """Padded to four tiles an image and stacked, as the models take them."""
    batches = [files[begin : begin + BATCH] for begin in range(0, len(files), BATCH)]

    def theirs(processor: Callable, kind: str) -> Callable[[], None]:
        return over(
            batches,
            lambda batch: processor([[opened(data)] for data in batch], return_tensors=kind),
        )

    def stacked(batch: Sequence[bytes]) -> np.ndarray:
        tiles = np.zeros((len(batch), 1, 4, 3, TILE, TILE), np.uint8)
        for slots, data in zip(tiles, batch, strict=True):
            preprocess(data, tile_size=TILE, out=slots[0])
        return tiles

    return {
        "ours, uint8": over(batches, stacked),
        "HF fast": theirs(fast, "pt"),
        "HF Pillow": theirs(pillow, "np"),
    }


def threads_gain(files: Sequence[bytes], rounds: int) -> float:
    """How many times as many images two threads make as one, by the clock."""
    seconds = {}
    for threads in (1, 2) * rounds:
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            list(pool.map(ours, files))
            elapsed = time.perf_counter() - begin
        seconds[threads] = min(elapsed, seconds.get(threads, elapsed))
    return seconds[1] / seconds[2]


def show(title: str, contenders: dict[str, Callable], count: int, rounds: int) -> dict[str, dict]:
    seconds = fastest(contenders, rounds)
    rows = {
        name: {
            "images_per_second": round(count / time, 1),
            "ms": round(1e3 * time / count, 2),
            "times_hf_fast": round(seconds["HF fast"] / time, 2),
        }
        for name, time in seconds.items()
    }
    print(f"\n{title:<24}{'images/s':>10}{'ms each':>10}{'x HF fast':>11}")
    for name, row in rows.items():
        print("{:<24}{:>10}{:>10}{:>11}".format(name, *row.values()))
    return rows


def machine() -> dict[str, str | int | None]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    print(" ".join(f"{name}={value}" for name, value in about.items()))
    files = make_files(options.pictures, options.seed)
    pixels = sum(image.width * image.height for image in map(opened, files))
    bits = round(8 * sum(map(len, files)) / pixels, 2)
    mega = round(pixels / len(files) / 1e6, 2)
    print(f"{len(files)} files of {mega} megapixels and {bits} bits a pixel on average")

    fast, pillow = processors()
    same = compare(files, fast, pillow)
    print(f"pixels: {same}")
    theirs, counts = (fast, pillow), (len(files), options.rounds)
    pictures = [load_image(data) for data in files]
    from_files = one_by_one(files, *theirs) | {"Pillow's decoding alone": over(files, load_image)}
    from_pictures = one_by_one(pictures, *theirs) | {
        "Pillow's resize alone": over(pictures, resized_by_pillow)
    }
    small, many = prepared(files), f"in batches of {BATCH}"
    results = {
        "encoded": show("from encoded files", from_files, *counts),
        "batches": show(many, in_batches(files, *theirs), *counts),
        "prepared": show("resized beforehand", one_by_one(small, *theirs), *counts),
        "prepared batches": show(f"resized, {many}", in_batches(small, *theirs), *counts),
        "decoded": show("from decoded pictures", from_pictures, *counts),
        "two_threads": round(threads_gain(files, options.rounds), 2),
    }
    print(f"\ntwo threads make {results['two_threads']} times as many images as one")
    print(json.dumps({**about, "pictures": len(files), "bits_a_pixel": bits, **same, **results}))


if __name__ == "__main__":
    main()
