"""`l32jax data prepare`: what it is told, and what it says."""

from pathlib import Path

import pytest

from l32jax.cli import data
from l32jax.data.prepare.config import Duplicates, PrepareConfig
from l32jax.errors import InputError
from tests.data_tests.small_records import contents, prepare_here, write_records


def test_sources_and_an_output():
    words = (
        "a.jsonl",
        "b/*.tar",
        "out",
        "num_shards=3",
        "text=None",
        "duplicates.image_distance=3",
    )
    assert data.read_config(words, "tok") == PrepareConfig(
        sources=("a.jsonl", "b/*.tar"),
        output="out",
        tokenizer="tok",
        num_shards=3,
        text=None,
        duplicates=Duplicates(image_distance=3),
    )


def test_a_config_file(tmp_path):
    path = tmp_path / "data.py"
    path.write_text(
        "from l32jax.data.prepare.config import PrepareConfig\n"
        "def config(): return PrepareConfig(sources=('a',), output='b', tokenizer='c')\n"
    )
    config = data.read_config((str(path), "languages=('en','de')"), None)
    assert config.tokenizer == "c" and config.languages == ("en", "de")
    path.write_text("def config(): return 1\n")
    with pytest.raises(InputError, match="gives int, not a PrepareConfig"):
        data.read_config((str(path),), None)


@pytest.mark.parametrize(
    "words, tokenizer, message",
    [
        ((), "tok", "give sources and the folder"),
        (("a.jsonl",), "tok", "give sources and the folder"),
        (("a.jsonl", "out"), None, "--tokenizer"),
        (("a.jsonl", "out", "seeed=1"), "tok", "did you mean 'seed'"),
    ],
)
def test_what_is_missing_is_told(words, tokenizer, message):
    with pytest.raises(InputError, match=message):
        data.read_config(words, tokenizer)


def test_two_schedulers_are_one_too_many():
    with pytest.raises(InputError, match="--beam and --ray"):
        data.prepare(("a", "b"), beam="DirectRunner", ray="local")


def test_it_prepares_and_tells_what_was_removed(tmp_path, capsys):
    folder = write_records(tmp_path)
    words = (str(folder / "records.jsonl"), str(tmp_path / "out"), "num_shards=2", "max_bad=0.5")
    tokenizer = str(folder / "tokenizer.model")
    assert data.prepare(words, tokenizer=tokenizer, workers=1) == 0
    told = capsys.readouterr().out
    assert "removed: unusable" in told and "out is written" in told
    config = data.read_config((words[0], str(tmp_path / "here"), *words[2:]), tokenizer)
    prepare_here(config)
    assert contents(tmp_path / "out") == contents(Path(config.output))
    assert data.prepare(words, tokenizer=tokenizer, workers=1) == 0  # it is there already
