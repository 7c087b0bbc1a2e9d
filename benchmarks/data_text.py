"""Texts to packed rows of tokens, beside Hugging Face's `datasets` and `transformers`.

    python -m benchmarks.data_text
    python -m benchmarks.data_text --length 2048 --rounds 3

One core each: CPU seconds of all threads, best of several rounds in which both take turns over the
same texts: the descriptions and documentation of the packages of this environment. Both have
Llama 3's own vocabulary (pip install --no-deps llama-models==0.3.0) and must find the same ids.

  theirs  dataset.map(tokenizer, batched=True), then .map(group_texts, batched=True): the texts run
          on across rows, as `run_clm.py` has it; kept in memory
  ours    documents packed whole (best fit, by grain) with positions, intervals of attention,
          targets and weights: rows as the model takes them

Prints a table and a line of JSON.
"""

import argparse
import importlib.util
import json
import os
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import grain
import numpy as np
import tiktoken
import tokenizers
import transformers

from l32jax.data.packing import RowShape, fit, pack
from l32jax.data.records import Record, to_sample
from l32jax.data.rows import Batch, make_row
from l32jax.data.samples import Sample
from l32jax.data.tokenizer import Tokenizer
from l32jax.data.tokenizer_export import hugging_face_files

SHORTEST = 200  # characters
SPECIAL = "<|"  # in plain text these are names to us and tokens to them
OPEN_ROWS = 32


def read_texts() -> list[str]:
    site = Path(sysconfig.get_paths()["purelib"])
    paths = sorted(path for kind in ("METADATA", "*.md", "*.rst") for path in site.rglob(kind))
    texts = [path.read_text(errors="replace") for path in paths]
    return [text for text in texts if len(text) >= SHORTEST and SPECIAL not in text]


def llama3() -> Tokenizer:
    package = importlib.util.find_spec("llama_models")
    assert package and package.origin, "pip install --no-deps llama-models==0.3.0"
    return Tokenizer.from_file(Path(package.origin).parent / "llama3" / "tokenizer.model")


def converted(tokenizer: Tokenizer) -> transformers.PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in hugging_face_files(tokenizer.vocabulary).items():
            (Path(folder) / name).write_bytes(content)
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


class Ours:
    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, length: int):
        self.texts, self.tokenizer, self.shape = texts, tokenizer, RowShape(length=length)

    def tokenise(self) -> list[Sample]:
        records = (Record(str(index), (text,)) for index, text in enumerate(self.texts))
        samples = (to_sample(record, self.tokenizer, with_images=False) for record in records)
        return [sample for sample in samples if isinstance(sample, Sample)]

    def pack(self, samples: Sequence[Sample]) -> list[Batch]:
        rng = np.random.default_rng(0)
        pieces = [piece for sample in samples for piece in fit(sample, self.shape, rng)]
        elements = grain.MapDataset.source([{"sample": each, "bad": []} for each in pieces])
        reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        packed = pack(
            elements.to_iter_dataset(reading),
            self.shape,
            packing="best_fit",
            open_rows=OPEN_ROWS,
            seed=0,
        )
        return [make_row(row["sample"], length=self.shape.length) for row in packed]


class Theirs:
    def __init__(
        self, texts: list[str], tokenizer: transformers.PreTrainedTokenizerFast, length: int
    ):
        self.texts = datasets.Dataset.from_dict({"text": texts})
        self.tokenizer, self.length = tokenizer, length
        self.ends = [tokenizer.convert_tokens_to_ids("<|end_of_text|>")]

    def tokenise(self) -> datasets.Dataset:
        def encode(batch: dict[str, list]) -> dict[str, list]:
            ids = self.tokenizer(batch["text"])["input_ids"]  # begins with begin-of-text
            return {"input_ids": [each + self.ends for each in ids]}

        return self.texts.map(
            encode,
            batched=True,
            remove_columns=["text"],
            keep_in_memory=True,
            load_from_cache_file=False,
        )

    def pack(self, tokens: datasets.Dataset) -> list[np.ndarray]:
        def group(batch: dict[str, list]) -> dict[str, list]:
            ids = list(chain(*batch["input_ids"]))
            whole = len(ids) // self.length * self.length
            rows = [ids[begin : begin + self.length] for begin in range(0, whole, self.length)]
            return {"input_ids": rows, "labels": [list(row) for row in rows]}

        rows = tokens.map(group, batched=True, keep_in_memory=True, load_from_cache_file=False)
        return [np.asarray(row["input_ids"]) for row in rows.with_format("numpy")]


def check(ours: Ours, theirs: Theirs) -> dict[str, float | int]:
    """The same ids of every text, and no token lost in packing; how full our rows are."""
    samples, tokens = ours.tokenise(), theirs.tokenise()
    assert [list(sample.documents[0].tokens) for sample in samples] == list(tokens["input_ids"])
    total = sum(len(sample.documents[0].tokens) for sample in samples)
    rows = ours.pack(samples)
    used = sum(int((row["stop"] > 0).sum()) for row in rows)
    assert used == total, (used, total)
    return {"tokens": total, "filled": round(total / len(rows) / ours.shape.length, 4)}


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


def measure(pipeline: Ours | Theirs) -> np.ndarray:
    tokenising, tokens = seconds(pipeline.tokenise)
    packing, _ = seconds(lambda: pipeline.pack(tokens))
    return np.array([tokenising, packing, tokenising + packing])


def show(best: dict[str, np.ndarray], tokens: int) -> dict[str, dict[str, float]]:
    results = {}
    print(f"\n{'million tokens/s':<20}{'ours':>10}{'theirs':>10}{'ratio':>8}")
    for index, name in enumerate(("tokenise", "pack", "both")):
        ours, theirs = (tokens / 1e6 / best[side][index] for side in ("ours", "theirs"))
        results[name] = {
            "ours": round(ours, 2),
            "theirs": round(theirs, 2),
            "ratio": round(ours / theirs, 2),
        }
        print("{:<20}{:>10}{:>10}{:>8}".format(name, *results[name].values()))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    about = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tiktoken": tiktoken.__version__,
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
    }
    print(" ".join(f"{name}={value}" for name, value in about.items()))
    datasets.disable_progress_bars()
    texts, tokenizer = read_texts(), llama3()
    ours = Ours(texts, tokenizer, options.length)
    theirs = Theirs(texts, converted(tokenizer), options.length)
    size = round(sum(len(text.encode()) for text in texts) / 1e6, 2)
    facts = {"texts": len(texts), "megabytes": size, "length": options.length}
    facts |= check(ours, theirs)
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    best = {"ours": np.full(3, np.inf), "theirs": np.full(3, np.inf)}
    for _ in range(options.rounds):
        for name, pipeline in (("ours", ours), ("theirs", theirs)):
            best[name] = np.minimum(best[name], measure(pipeline))
    results = show(best, int(facts["tokens"]))
    print(json.dumps({**about, **facts, **results}))


if __name__ == "__main__":
    main()
