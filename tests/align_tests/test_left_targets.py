"""What models leave beside tokens comes back beside the same tokens, and is what they say."""

import dataclasses
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from l32jax.align import left_targets
from l32jax.align.left_targets import LeftConfig, leave_targets
from l32jax.api import load
from l32jax.data.beside_packed import packed, unpacked
from l32jax.data.samples import Document
from l32jax.data.shards import INDEX
from l32jax.data.sources.mixture import open_batches
from l32jax.data.sources.open import open_source
from l32jax.errors import InputError
from l32jax.objective_config import Distill, Dpo
from l32jax.presets import TINY_TEXT
from l32jax.run_config import DataConfig
from l32jax.sharding import make_mesh
from tests.lines import write_lines

TEXTS = ["Gates open slowly.", "A tile is one.", "w" * 150, "Ten words or so are enough for it."]
WORDS = TINY_TEXT.decoder.vocab_size
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    records = [*({"text": text} for text in TEXTS), {"messages": turns}]
    write_lines(folder / "texts.jsonl", records)
    pairs = {"prompt": "Who?", "chosen": "Me, of course.", "rejected": "No.", "margin": 2}
    write_lines(folder / "pairs.jsonl", [pairs] * 3)
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), "png")
    (folder / "noise.png").write_bytes(file.getvalue())
    asked = {"image": "noise.png", "question": "What is it?", "answer": "Noise, all over."}
    write_lines(folder / "seen.jsonl", [asked, {"text": "No picture."}])
    return folder


def config(source: Path, output: Path, **changes) -> LeftConfig:
    data = {name: changes.pop(name) for name in ("max_images", "max_pairs") if name in changes}
    return LeftConfig(
        data=DataConfig(mixture=((str(source), 1.0),), batch_size=8, length=LENGTH, **data),
        output=str(output),
        **{"teachers": (("tiny-text", 1.0),), "logs": "float32"} | changes,
    )


def left(config: LeftConfig):
    mesh = make_mesh()
    return leave_targets(config, [load(path, mesh=mesh) for path, _ in config.teachers])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def said(document: Document, name="tiny-text", images=()) -> np.ndarray:
    """Log-probabilities of all words after each token but the last."""
    return log_softmax(load(name).logits(list(document.tokens), images))[:-1]


def samples_of(output: Path):
    return list(open_source(str(output), load("tiny-text").tokenizer, with_images=True))


def assert_is_said(document: Document, logs: np.ndarray, tolerance: float) -> None:
    learned = np.asarray(document.weights[1:]) > 0
    beside = {name: found[1:][learned] for name, found in document.beside.items()}
    targets = np.array(document.tokens)[1:][learned]
    expected = np.take_along_axis(logs[learned], targets[:, None], -1)[:, 0]
    np.testing.assert_allclose(beside["reference"], expected, atol=1e-4)
    if "teacher_words" not in beside:
        return
    found = np.take_along_axis(logs[learned], beside["teacher_words"], -1)
    np.testing.assert_allclose(beside["teacher_logs"], found, atol=tolerance)
    likeliest = np.sort(logs[learned], -1)[:, ::-1][:, : found.shape[1]]
    np.testing.assert_allclose(np.sort(found, -1)[:, ::-1], likeliest, atol=1e-4)


@pytest.mark.parametrize(
    ("logs", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05), ("int8", 0.05)]
)
def test_the_likeliest_words_are_those_of_the_model(folder, tmp_path, logs, tolerance):
    index = left(config(folder / "texts.jsonl", tmp_path / "out", top_k=9, logs=logs))
    samples = samples_of(tmp_path / "out")
    assert len(samples) == 7  # the long one is in three pieces
    for sample in samples:
        assert_is_said(sample.documents[0], said(sample.documents[0]), tolerance)
    assert index is not None and 0 < index["teacher_mass"] < 1


def test_models_as_a_mixture_with_a_temperature(folder, tmp_path):
    teachers = (("tiny-text", 1.0), (str(tmp_path / "other"), 3.0))
    from l32jax.conversion.convert import save

    other = load("tiny-text", seed=5)
    save(other, tmp_path / "other")
    left(
        config(
            folder / "texts.jsonl",
            tmp_path / "out",
            teachers=teachers,
            top_k=WORDS,
            temperature=2.0,
        )
    )
    document = samples_of(tmp_path / "out")[0].documents[0]
    each = [load("tiny-text").logits(list(document.tokens)), other.logits(list(document.tokens))]
    mixed = 0.25 * np.exp(log_softmax(each[0] / 2)) + 0.75 * np.exp(log_softmax(each[1] / 2))
    learned = np.asarray(document.weights[1:]) > 0
    words = document.beside["teacher_words"][1:][learned]
    expected = np.take_along_axis(np.log(mixed)[:-1][learned], words, -1)
    np.testing.assert_allclose(document.beside["teacher_logs"][1:][learned], expected, atol=1e-4)


def test_images_are_seen_and_come_back(folder, tmp_path):
    left(
        config(
            folder / "seen.jsonl", tmp_path / "out", top_k=4, max_images=2,
            teachers=(("tiny-vision", 1.0),),
        )
    )  # fmt: skip
    tokenizer = load("tiny-vision").tokenizer
    seen, text = open_source(str(tmp_path / "out"), tokenizer, with_images=True)
    assert seen.images == ((folder / "noise.png").read_bytes(),) and not text.images
    document = seen.documents[0]
    assert_is_said(document, said(document, "tiny-vision", [folder / "noise.png"]), 1e-4)


def test_comparisons_stay_together_and_bring_the_reference(folder, tmp_path):
    left(config(folder / "pairs.jsonl", tmp_path / "out", top_k=0, max_pairs=2))
    for sample in samples_of(tmp_path / "out"):
        assert [tuple(pair) for pair in sample.pairs] == [(0, 1, 2.0)]
        for document in sample.documents:
            assert document.beside["format"].sum() >= 2  # special tokens of the dialog
            assert_is_said(document, said(document), 1e-4)


def batch_of(output: Path, objective, **data):
    model = load("tiny-text")
    how = DataConfig(mixture=((str(output), 1.0),), batch_size=2, length=128, **data)
    batches = open_batches(
        how, TINY_TEXT, model.tokenizer, objective=objective, seed=1, process_index=0,
        process_count=1,
    )  # fmt: skip
    return next(batches), batches


def test_in_packed_rows_they_stand_beside_their_tokens(folder, tmp_path):
    left(config(folder / "texts.jsonl", tmp_path / "out", top_k=WORDS))
    batch, batches = batch_of(tmp_path / "out", Distill(top_k=WORDS))
    batches.close()
    assert len(np.unique(batch["start"][0])) > 2  # several documents
    for row in range(2):
        for begin in np.unique(batch["start"][row][batch["stop"][row] > 0]):
            inside = (batch["start"][row] == begin) & (batch["stop"][row] > 0)
            logs = log_softmax(load("tiny-text").logits(batch["tokens"][row][inside].tolist()))
            learned = batch["weights"][row][inside] > 0
            words = batch["teacher_words"][row][inside][learned]
            expected = np.take_along_axis(logs[learned], words, -1)
            found = batch["teacher_logs"][row][inside][learned]
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_parts_and_a_kill_between_units_make_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(left_targets, "UNIT", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    made = config(folder / "texts.jsonl", whole, top_k=3)
    left(made)
    of_parts = dataclasses.replace(made, output=str(parts))
    assert left(dataclasses.replace(of_parts, part=(1, 2))) is None
    write, count = left_targets._write, []

    def killed(*args):
        if count:
            raise KeyboardInterrupt
        count.append(write(*args))

    monkeypatch.setattr(left_targets, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        left(dataclasses.replace(of_parts, part=(0, 2)))
    assert not (parts / INDEX).exists()
    monkeypatch.setattr(left_targets, "_write", write)
    left(dataclasses.replace(of_parts, part=(0, 2)))
    files = {path.name for path in whole.iterdir()}
    assert {path.name for path in parts.iterdir()} == files and len(files) == 4
    for name in files:
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"teachers": (("tiny-text", 0.0),)}])
def test_nothing_is_begun_with_values_that_cannot_be(folder, tmp_path, changes):
    with pytest.raises(InputError, match="above 0"):
        left(config(folder / "texts.jsonl", tmp_path / "out", top_k=3, **changes))
    assert not (tmp_path / "out").exists()


def test_rows_of_one_token_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="length=1 of rows"):
        data = DataConfig(mixture=(("none", 1.0),), batch_size=1, length=1)
        LeftConfig(data=data, output=str(tmp_path), teachers=(("tiny-text", 1.0),))


@pytest.mark.parametrize("teachers", [("tiny-text", "tiny-vision"), ("tiny-vision", "tiny-text")])
def test_all_teachers_must_see_what_there_is_to_see(folder, tmp_path, teachers):
    named = tuple((name, 1.0) for name in teachers)
    with pytest.raises(InputError, match="the model is text-only"):
        left(config(folder / "seen.jsonl", tmp_path / "out", max_images=1, teachers=named))


def test_what_other_weights_have_left_is_not_gone_on_with(folder, tmp_path):
    made = config(folder / "texts.jsonl", tmp_path / "out", top_k=3)
    mesh = make_mesh()
    leave_targets(made, [load("tiny-text", mesh=mesh, seed=0)])
    with pytest.raises(InputError, match="it is of other sources, models or settings"):
        leave_targets(made, [load("tiny-text", mesh=mesh, seed=1)])


def test_parts_that_end_together_write_one_index(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(left_targets, "UNIT", 1)
    finish, ending = left_targets._finish, []
    monkeypatch.setattr(left_targets, "_finish", lambda *args: ending.append(args))
    made = config(folder / "texts.jsonl", tmp_path / "out", top_k=3)
    for number in range(2):
        left(dataclasses.replace(made, part=(number, 2)))
    together = threading.Barrier(8)

    def end(number: int):
        together.wait()
        return finish(*ending[number % 2])

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(end, range(8)))
    assert all(index == found[0] and index is not None for index in found)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {INDEX, *found[0]["shards"]}


@pytest.mark.parametrize(
    ("objective", "data", "why"),
    [
        (Distill(top_k=4), {}, "was written with {'top_k': 3}"),
        (Distill(top_k=3, temperature=2.0), {}, "'temperature': 1.0"),
        (Dpo(reference="data"), {"max_pairs": 2}, "learns from comparisons"),
    ],
)
def test_what_was_left_must_be_what_is_learned_from(folder, tmp_path, objective, data, why):
    left(config(folder / "texts.jsonl", tmp_path / "out", top_k=3))
    with pytest.raises(InputError, match=why):
        batch_of(tmp_path / "out", objective, **data)
    with pytest.raises(InputError, match="no model has left anything"):
        batch_of(folder / "texts.jsonl", objective, **data)


@hypothesis.given(
    st.integers(0, 40), st.integers(1, 9), st.sampled_from(["float32", "bfloat16", "int8"]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_packed_arrays_come_back(length, top_k, logs, seed):
    random = np.random.default_rng(seed)
    weights = random.integers(0, 2, length).astype(np.float32)
    beside = {
        "format": random.integers(0, 2, length).astype(np.float32),
        "teacher_words": random.integers(0, 2**24, (length, top_k)).astype(np.int32),
        "teacher_logs": -random.exponential(5, (length, top_k)).astype(np.float32),
    }
    document = Document([0] * length, weights.tolist(), (), beside)
    found = unpacked(packed(document, logs), weights)
    learned = weights > 0
    for name, array in beside.items():
        spread = np.ptp(array[learned], axis=-1, keepdims=True) if array.ndim > 1 else 0
        close = {"float32": 0, "bfloat16": np.abs(array[learned]) / 256, "int8": spread / 500}
        allowed = close[logs] if name == "teacher_logs" else 0
        assert (np.abs(found[name][learned] - array[learned]) <= allowed + 1e-6).all()
        assert not found[name][~learned].any() and found[name].dtype == array.dtype
