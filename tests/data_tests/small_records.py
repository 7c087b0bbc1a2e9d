"""A small set of records of all kinds, with duplicates and broken ones among them."""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from l32jax.data.prepare import run
from l32jax.data.prepare.config import PrepareConfig
from l32jax.data.prepare.task import run_task
from l32jax.data.tokenizer import Tokenizer

WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
]


def some_text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def some_picture(seed: int, side: int = 20, width: int = 160, height: int = 120) -> Image.Image:
    """A smooth one, as photographs are, of side x side spots."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def write_records(folder: Path) -> Path:
    """Sixty. Of each ten: four texts and one nearly the same, three captions and one of a picture
    seen before, and a conversation; and two of all are broken."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    lines = []
    for index in range(0, 60, 10):
        texts = [some_text(rng, 80) for _ in range(4)]
        names = [f"{index + i}.{'jpg' if i else 'png'}" for i in range(4)]
        pictures = [some_picture(index + i) for i in range(3)]
        pictures.append(pictures[0].resize((110, 83)))  # and in another format
        for name, picture in zip(names, pictures, strict=True):
            picture.save(folder / name)
        lines += [{"text": text} for text in (*texts, texts[0] + " and more")]
        lines += [{"image": name, "text": some_text(rng, 6)} for name in names]
        turns = (("user", some_text(rng, 7)), ("assistant", some_text(rng, 12)))
        lines.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    encoded = [json.dumps(line) for line in lines]
    encoded[7] = encoded[7][:-4]
    (folder / "30.png").write_bytes((folder / "30.png").read_bytes()[:300])  # of record 35
    (folder / "records.jsonl").write_text("\n".join(encoded))
    (folder / "tokenizer.model").write_bytes(Tokenizer.bytes_only().to_bytes())
    return folder


def config_for(folder: Path, output: Path, **changes) -> PrepareConfig:
    return PrepareConfig(
        **{
            "sources": (str(folder / "records.jsonl"),),
            "output": str(output),
            "tokenizer": str(folder / "tokenizer.model"),
            "num_shards": 3,
            **changes,
        }
    )


def prepare_here(config: PrepareConfig) -> dict:
    """Without other processes."""

    def runner(tasks):
        for index, task in enumerate(tasks):
            run_task(task)
            yield index

    return run.prepare(config, runner)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
