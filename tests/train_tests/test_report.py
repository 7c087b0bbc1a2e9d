"""What a stage writes while it runs, and what it shows."""

import dataclasses
import io
import json
import struct
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from l32jax.data import batches
from l32jax.data.batches import place
from l32jax.data.tokenizer import Tokenizer
from l32jax.model import llama
from l32jax.run_config import TrainConfig
from l32jax.sharding import single_device_mesh
from l32jax.train import examples, goodput, inside, report, view
from l32jax.train.flops import Counts
from l32jax.train.hosts import Hosts
from l32jax.train.report import Report
from l32jax.train.speed import Speed, full_step
from tests.train_tests.small import LENGTH, MODEL, rows, stage

STEPS = 6


@pytest.fixture(scope="module")
def params():
    with jax.set_mesh(single_device_mesh()):
        return jax.jit(lambda: llama.init_params(MODEL, jax.random.key(0)))()


@pytest.fixture
def config(tmp_path):
    stages = stage(("vision_tower", "adapter"), STEPS), stage(("adapter",), 10 * STEPS)
    return TrainConfig(
        model=MODEL, stages=stages, directory=str(tmp_path), log_every=2, show_every=4
    )


@pytest.fixture
def probe(monkeypatch):
    """In place of the real one: the likeliest token is always "!"."""
    asked_of = []

    def found(params, batch, looked, asked):
        asked_of.append((looked, asked))
        layers = MODEL.decoder.count("cross")
        looks = inside.Looks(*np.full((6, layers), 0.25, np.float32))
        return inside.Found(looks, np.full_like(asked, ord("!")))

    monkeypatch.setattr(inside, "make_probe", lambda config, mesh: found)
    return asked_of


def run(config, params, *, first=0, last=STEPS, waits=0.0, saves=0.0) -> goodput.Goodput:
    """A stage whose steps are over at once, and have the loss 1 / number."""
    mesh, batch = single_device_mesh(), rows(4, images=True)
    clock = goodput.Clock(Path(config.directory))
    with jax.set_mesh(mesh):
        placed = place(batch, mesh)
        report = Report(config, 0, first, clock=clock, mesh=mesh, tokenizer=Tokenizer.bytes_only())
        with report:
            for index in range(first, last):
                with report.waiting():
                    time.sleep(waits)
                one = jnp.float32(1.0)
                metrics = {"loss": one / (index + 1), "accuracy": one, "weight": one * 40}
                metrics |= {"grad_norm": one, "grad_norm/adapter": one, "learning_rate": 0.5}
                report(index, batch, metrics, placed=placed, params=params)
                if saves and index == 2:
                    with report.saving():
                        time.sleep(saves)
    clock.close()
    return goodput.read(Path(config.directory))


def lines(config) -> list[dict]:
    text = (Path(config.directory) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def events(config) -> list[Event]:
    found = []
    for path in sorted(Path(config.directory).glob("tensorboard/small/events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_lines_have_every_number_by_group(config, params, probe):
    run(config, params, waits=0.01)
    told = lines(config)
    assert [line["step"] for line in told] == [2, 4, 6]
    assert [line["loss"] for line in told] == pytest.approx([1 / 2, 1 / 4, 1 / 6])
    named = set(told[1]) - {"stage", "step", "time", "loss", "accuracy"}
    assert {name.partition("/")[0] for name in named} == {"optim", "data", "perf", "inside"}
    assert {"optim/learning_rate", "optim/grad_norm", "optim/grad_norm/adapter"} <= named
    assert {"data/weight", "data/wait", "data/padding_text", "data/padding_tiles"} <= named
    assert {"perf/step_s", "perf/step_s_p95", "perf/tflops_per_s", "perf/goodput"} <= named
    assert {f"inside/attention_gate/{layer}" for layer in (1, 3)} <= named
    assert {f"inside/residual_share/{layer}" for layer in (1, 3)} <= named
    assert "perf/mfu" not in named, "the peak of a CPU is not known"
    assert "inside/residual_share/1" not in told[0]


def test_speeds_are_of_the_time_between_ends(config, params, probe):
    """Of the first step, which compiles, and of pauses nothing is in them."""
    found = run(config, params, waits=0.1, saves=0.5)
    told = lines(config)
    counts = Counts.of(rows(4, images=True))
    for line in told:
        assert 0.1 <= line["perf/step_s"] < 0.4
        assert line["perf/tokens_per_s"] == pytest.approx(counts.tokens / line["perf/step_s"])
        assert line["perf/images_per_s"] == pytest.approx(counts.images / line["perf/step_s"])
        assert 0.25 < line["data/wait"] <= 1
    assert STEPS * 0.1 <= found.seconds["data_loading_sync"] < STEPS * 0.2
    assert 0.5 <= found.seconds["unproductive_checkpoint_save_time"] < 0.8


def test_a_wait_that_the_devices_did_not_notice_costs_nothing(config, params, probe, monkeypatch):
    monkeypatch.setattr("l32jax.train.report._Step.is_done", lambda step: False)
    run(config, params, waits=0.05)
    assert [line["data/wait"] for line in lines(config)] == [0, 0, pytest.approx(0.5, abs=0.3)]


def test_the_board_has_numbers_pictures_and_words(config, params, probe):
    run(config, params)
    values = [(event.step, value) for event in events(config) for value in event.summary.value]
    losses = [(step, value.simple_value) for step, value in values if value.tag == "loss"]
    assert losses == [(2, 0.5), (4, 0.25), (6, pytest.approx(1 / 6))]
    pictures = [(step, value) for step, value in values if value.HasField("image")]
    assert {step for step, _ in pictures} == {4, 6}, "every show_every steps, and at the end"
    assert all(value.image.encoded_image_string[1:4] == b"PNG" for _, value in pictures)
    words = [v.tensor.string_val[0].decode() for _, v in values if v.tag.startswith("examples")
             if not v.HasField("image")]  # fmt: skip
    assert any("**answer**\n\n    !!!" in text for text in words)


def test_after_a_restart_the_board_forgets_what_was_undone(config, params, probe):
    run(config, params)
    run(config, params, first=3)
    restarts = [event for event in events(config) if event.HasField("session_log")]
    assert restarts[-1].step == 4


def test_other_processes_write_nothing(config, params, probe, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(report, "row_share", lambda _: (1, 2))
    monkeypatch.setattr(batches, "row_share", lambda _: (0, 1))  # what is here is all
    monkeypatch.setattr(Hosts, "compare", lambda *_: {})  # which asks the other one
    monkeypatch.setattr(goodput, "Clock", lambda _: _clock_without_folder())
    run(config, params)
    assert list(Path(config.directory).iterdir()) == []
    assert len(probe) == 2, "but they compute what all processes must"


def _clock_without_folder(make=goodput.Clock):
    return make(None)


def test_the_answers_are_the_models_own(config, params):
    """With the real probe: the places that are asked about, and what scores highest after them."""
    mesh, batch = single_device_mesh(), rows(4, images=True)
    chosen = examples.choose(batch, MODEL.vision, max_places=inside.PLACES)
    asked = examples.asked_places(chosen, (4, inside.PLACES))
    looked = examples.looking_places(batch, inside.PLACES)
    with jax.set_mesh(mesh):
        placed = place(batch, mesh)
        found = inside.make_probe(config, mesh)(params, placed, looked, asked)
        scores = jax.jit(lambda p, b: llama.batch_logits(llama.bind(MODEL, p), b))(params, placed)
    for example in chosen:
        expected = np.asarray(scores)[example.row, example.places].argmax(-1)
        found_here = found.likeliest[example.row, : len(example.places)]
        np.testing.assert_array_equal(found_here, expected)


# Examples


def test_of_a_packed_row_one_document_that_looks_is_shown():
    batch = rows(3, images=True)
    found = examples.choose(batch, MODEL.vision, max_places=4)
    assert [example.row for example in found] == [0, 1, 2]
    assert [example.image for example in found] == [None, 0, 0]
    assert all(len(example.places) <= 4 for example in found)
    told = examples.tell(found[1], batch, np.full((3, 4), ord("x")), Tokenizer.bytes_only())
    assert told.answer == "xxxx"
    assert told.truth == bytes(batch["targets"][1, found[1].places].tolist()).decode()
    assert len(told.question) == 1, "the image token has no text"


def test_rows_without_targets_have_no_examples():
    batch = rows(2, images=False)
    batch["weights"][:] = 0
    assert examples.choose(batch, None, max_places=4) == []
    assert np.all(examples.looking_places(batch, 8) == -1)


def test_a_picture_is_put_together_again():
    """From tiles side by side; pixels and normalised floats alike."""
    random = np.random.default_rng(0)
    canvas = random.integers(0, 256, (28, 56, 3), np.uint8)
    tiles = canvas.reshape(28, 2, 28, 3).transpose(1, 3, 0, 2)
    batch = {"aspect": np.array([[[1, 2]]]), "tiles": np.zeros((1, 1, 4, 3, 28, 28), np.uint8)}
    batch["tiles"][0, 0, :2] = tiles
    example = examples.Example(0, 0, np.array([0]), 0)
    np.testing.assert_array_equal(np.asarray(examples.picture(example, batch)), canvas)
    mean, std = (np.array(x)[:, None, None] for x in (examples.CLIP_MEAN, examples.CLIP_STD))
    floats = batch | {"tiles": ((batch["tiles"] / 255 - mean) / std).astype(np.float32)}
    np.testing.assert_array_equal(np.asarray(examples.picture(example, floats)), canvas)


def test_a_caption_takes_any_text():
    told = examples.Told("what\nis\nthis? 🙂" * 50, "", "日本語 a circle")
    picture = examples.picture(
        examples.Example(0, 0, np.array([0]), 0),
        {"aspect": np.ones((1, 1, 2), int), "tiles": np.zeros((1, 1, 1, 3, 28, 28), np.uint8)},
    )
    assert picture is not None
    shown = examples.captioned(picture, told)
    assert shown.dtype == np.uint8 and shown.shape[1] == 320 and 60 < shown.shape[0] < 400


# Speed


def test_mfu_is_of_the_peak_of_all_devices():
    one, four = (Speed(MODEL, stage(("adapter",)), count, "TPU v5 lite") for count in (1, 4))
    counts = Counts.of(rows(4, images=True))
    for each in (one, four):
        each.add(0.5, 0.0, counts)
    single, quarter = one.take(), four.take()
    assert single["perf/mfu"] == pytest.approx(single["perf/tflops_per_s"] * 1e12 / 197e12)
    assert quarter["perf/mfu"] == pytest.approx(single["perf/mfu"] / 4)
    assert single["perf/tflops_done_per_s"] > single["perf/tflops_per_s"]
    assert one.take() == {}, "there were no more steps"


def test_percentiles_are_of_recent_steps():
    found = Speed(MODEL, stage(("adapter",)), 1, "cpu")
    for number in range(300):
        found.add(100.0 if number < 100 else 1.0 + (number % 20 == 0) * 9, 0.0, Counts(tokens=1))
    told = found.take()
    assert told["perf/step_s_p50"] == 1.0 and 1.0 < told["perf/step_s_p95"] <= 10.0


def test_a_step_of_longer_rows_costs_more():
    short = stage(("adapter",))
    long = dataclasses.replace(short, data=dataclasses.replace(short.data, length=2 * LENGTH))
    assert full_step(MODEL, long) > 1.5 * full_step(MODEL, short)


# View

VALUES = {
    "loss": 1.5,
    "accuracy": 0.25,
    "optim/learning_rate": 3e-4,
    "perf/tokens_per_s": 12345.0,
    "perf/images_per_s": 0.0,
    "perf/tflops_per_s": 0.004,
    "perf/goodput": 0.8,
    "data/wait": 0.01,
    "data/padding_text": 0.2,
    "inside/attention_gate/1": -0.5,
    "inside/attention_gate/3": 0.25,
}


def shown(*, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    found = view.View("look", 100, 0, console)
    found.start()
    found.advance(100)
    found.show(100, VALUES, 0.0, 3 * 3600.0)
    found.stop()
    return file.getvalue()


def test_a_terminal_shows_it_all():
    text = shown(terminal=True)
    for part in (
        "100/100",
        "loss 1.500",
        "4.0 GFLOP/s",
        "gates █▅ -0.500 to +0.250",
        "goodput 80%",
    ):
        assert part in text
    assert "3 h 00 of the run" in text


def test_elsewhere_a_stage_ends_with_one_line():
    text = shown(terminal=False)
    assert text.count("\n") == 1 and "\x1b" not in text
    assert text.startswith("look 100/100  loss 1.500  accuracy 25.0%  rate 0.0003  12,345 tokens/s")


def test_mfu_stands_where_the_peak_is_known():
    assert "MFU 41.2%" in view.speed(VALUES | {"perf/mfu": 0.412})
    assert view.speed({"loss": 1.0}) == "", "before a step has been timed"
    assert view.inside({"loss": 1.0}) == "", "a text model has no gates"
