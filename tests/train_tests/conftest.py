"""What runs in processes of their own read and begin with; made once."""

import json

import numpy as np
import pytest
from PIL import Image

from l32jax.conversion.convert import save
from l32jax.data.tokenizer import Tokenizer
from l32jax.generate.model import Model
from l32jax.sharding import single_device_mesh
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import MODEL


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> str:
    """Documents of several lengths, with no, one and three pictures."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (28 + 14 * (number % 3), 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with (folder / "documents.jsonl").open("w") as file:
        for number in range(40):
            pictures = [
                {"image": f"{(number + n) % 6}.png"} for n in (0, 1, 3)[: number % 3 * 2 - 1]
            ]
            text = f"number {number} " * int(rng.integers(1, 6))
            parts = [*(pictures if number % 3 else []), text]
            file.write(json.dumps({"parts": parts}) + "\n")
    return str(folder / "documents.jsonl")


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> str:
    """Documents of text alone."""
    path = tmp_path_factory.mktemp("sentences") / "sentences.jsonl"
    records = [{"text": f"number {n} " * (1 + n % 4)} for n in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="session")
def beginning(tmp_path_factory) -> str:
    """A model to start from: to compile how random ones are made takes most of a start."""
    folder = str(tmp_path_factory.mktemp("beginning") / "model")
    mesh = single_device_mesh()
    save(Model(MODEL, random_params(MODEL, mesh), Tokenizer.bytes_only(), mesh), folder, to="orbax")
    return folder
