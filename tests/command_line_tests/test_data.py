"""`data inspect` makes a sheet of what a run trains on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l32jax.__main__ import main
from tests.data_tests.small_tokenizer_files import text_tokenizer

INSPECT = ("data", "inspect")
CONFIG = """
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.presets import TINY_VISION

def config():
    text = DataConfig(mixture=(("pictures.jsonl", 1.0),), batch_size=4, length=96, max_images=2)
    stage = dict(num_steps=3, trains=("adapter",), optimizer=OptimizerConfig(peak_lr=1e-3))
    return TrainConfig(
        model=TINY_VISION,
        stages=(
            StageConfig(name="captions", data=text, **stage),
            StageConfig(name="larger", data=text, image_size=56, **stage),
        ),
        directory="run",
    )
"""


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """The working directory, with captioned pictures, one of which is broken."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for number in range(8):
        pixels = np.full((30 + 9 * number, 50, 3), 25 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "text": f"<grey> number {number}"})
    lines.append({"image": "missing.png", "text": "nothing"})
    (tmp_path / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.py").write_text(CONFIG)
    return tmp_path


def test_a_page_shows_rows_of_the_stage(pictures, capsys):
    changes = ("stages.1.data.packing=none", "stages.1.data.batch_size=1")
    assert main([*INSPECT, "run.py", *changes, "--stage", "2", "--rows", "12"]) == 0
    assert capsys.readouterr().out == "rows.html shows 12 rows.\n"
    text = (pictures / "rows.html").read_text("utf-8")
    assert "run.py: stage 2, larger" in text and "tiles of 56 pixels" in text
    assert "&lt;grey&gt; number" in text and "<grey>" not in text
    assert text.count("<section>") == 12
    assert "missing.png" in text


def test_a_picture_shows_them_too(pictures):
    assert main([*INSPECT, "run.py", "--output", "sheet.png", "--rows", "2"]) == 0
    with Image.open(pictures / "sheet.png") as image:
        assert image.width == 1600


def test_the_tokenizer_is_that_of_the_model_to_start_from(run_folder, hugging_face_folder):
    start = f"start_from={hugging_face_folder}"
    assert main([*INSPECT, "config.py", start]) == 0
    assert "&lt;|eot_id|&gt;" in (run_folder / "rows.html").read_text("utf-8")


def test_a_text_models_tokenizer_learns_to_see(pictures):
    words = text_tokenizer(pictures, "<|endoftext|>")
    changes = ("tokenizer=tokenizer.json", f"model.decoder.vocab_size={words.num_tokens}")
    assert main([*INSPECT, "run.py", *changes]) == 0
    assert "&lt;grey&gt; number" in (pictures / "rows.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--stage", "0"), "--stage 0"),
        (("--stage", "3"), "stages 1 to 2"),
        (("--rows", "0"), "--rows 0"),
        (("--output", "sheet.gif"), ".html or .png"),
        (("--output", "no/such/sheet.html"), "no/such/sheet.html"),
        (("start_from=no/such/model",), "no/such/model"),
        (("tokenizer=no/such/tokenizer.model",), "no/such/tokenizer.model"),
        (("stages.0.data.mixture=(('no.jsonl',1.0),)",), "no.jsonl"),
    ],
)
def test_bad_input_is_told_in_one_line(pictures, complaint, arguments, told):
    assert told in complaint(*INSPECT, "run.py", *arguments)
    assert not list(pictures.glob("rows.*"))


def test_a_config_that_is_not_there_is_named(complaint, tmp_path):
    assert "missing.py" in complaint(*INSPECT, str(tmp_path / "missing.py"))
