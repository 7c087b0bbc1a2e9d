"""Preparing data: what comes out, in which order, and what is refused."""

import json

import numpy as np
import pytest

from l32jax.data import records as records_module
from l32jax.data.prepare import run
from l32jax.data.prepare.config import Duplicates, PrepareConfig
from l32jax.data.prepare.output import bounds, shuffled
from l32jax.data.samples import Sample
from l32jax.data.shards import read_index
from l32jax.data.sources.open import open_records, open_source
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from tests.data_tests.small_records import config_for, contents, prepare_here, write_records
from tests.data_tests.small_tokenizer_files import text_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def whole(folder):
    """The output of the records, in one piece."""
    prepare_here(config_for(folder, folder / "whole"))
    return folder / "whole"


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(run, "UNIT_RECORDS", 16)


def opened(output):
    return open_source(str(output), Tokenizer.bytes_only(), with_images=True)


def place_numbers(samples):
    return [int(sample.place.split()[-1]) for sample in samples]


def test_what_is_left_is_every_good_record_once(folder, whole):
    index = read_index(whole)
    # Of each ten lines the fifth repeats a text, and the ninth a picture. Lines 8 and 36 are
    # broken; so of the two that look like 36 it is 39 that is kept.
    assert index["removed"] == {"duplicate": 6 + 5, "unusable": 2}
    samples = opened(whole)
    removed = {i + k for i in range(0, 60, 10) for k in (5, 9)} - {39} | {8, 36}
    places = place_numbers(samples)
    assert sorted(places) == sorted(set(range(1, 61)) - removed) != places
    records = open_records(str(folder / "records.jsonl"))
    for sample, place in zip(samples, places, strict=True):
        assert isinstance(sample, Sample)
        assert sample.images == tuple(path.read_bytes() for path in records[place - 1].images)


def test_bad_records_are_listed_with_their_places(folder, tmp_path, caplog):
    config = config_for(folder, tmp_path / "out")
    prepare_here(config)
    lines = (tmp_path / "out/bad.jsonl").read_text().splitlines()
    assert [json.loads(line)["place"] for line in lines] == [
        "records.jsonl line 8",
        "records.jsonl line 36",
    ]
    assert "records.jsonl line 8: skipped (not JSON" in caplog.text


def test_too_many_bad_records_end_it_and_it_goes_on_when_more_are_allowed(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(records_module, "JUDGED_RECORDS", 10)
    config = config_for(folder, tmp_path / "out", max_bad=0.001)
    with pytest.raises(InputError, match=r"1 of 16 are unusable, such as records.jsonl line 8 \("):
        prepare_here(config)
    assert not (tmp_path / "out/index.json").exists()
    assert (tmp_path / "out/unfinished/unit-000000.json").exists()
    prepare_here(config_for(folder, tmp_path / "out", max_bad=0.1))


def test_the_order_depends_on_the_seed_alone(folder, whole, tmp_path):
    places = place_numbers(opened(whole))
    prepare_here(config_for(folder, tmp_path / "seed", seed=1))
    other = place_numbers(opened(tmp_path / "seed"))
    assert other != places and sorted(other) == sorted(places)
    prepare_here(config_for(folder, tmp_path / "shards", num_shards=5))
    assert place_numbers(opened(tmp_path / "shards")) == places


def test_the_sizes_of_tasks_change_nothing(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "BANDS_AT_ONCE", 100)
    monkeypatch.setattr(run, "UNIT_RECORDS", 23)
    prepare_here(config_for(folder, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(whole)


def test_a_text_models_tokenizer_learns_to_see(folder, tmp_path):
    """A run that grafts an image encoder onto a text model reads what was prepared with its own."""
    text = text_tokenizer(tmp_path, "<|endoftext|>")
    source = write_captions(folder)
    changes = {"tokenizer": str(tmp_path), "sources": (source,), "text": None}
    index = prepare_here(config_for(folder, tmp_path / "out", **changes))
    assert index["removed"]["unusable"] == 0 and index["statistics"]["images"] == 1
    for tokenizer in (text, text.with_image_token()):
        samples = open_source(str(tmp_path / "out"), tokenizer, with_images=True)
        ((seen,), (other,)) = sorted((s.documents for s in samples), key=lambda d: d[0].images)[
            ::-1
        ]
        assert (seen.tokens[0], seen.images) == (text.with_image_token().image_id, (0,))
        assert other.images == ()


def test_a_tokenizer_whose_text_may_become_an_image_prepares_text_alone(folder, tmp_path):
    text_tokenizer(tmp_path, "<|endoftext|>", "<|image|>")
    changes = {"tokenizer": str(tmp_path), "sources": (write_captions(folder),), "text": None}
    index = prepare_here(config_for(folder, tmp_path / "out", **changes))
    assert (index["removed"]["unusable"], index["statistics"]["samples"]) == (1, 1)
    assert "reads text only" in (tmp_path / "out/bad.jsonl").read_text()


def write_captions(folder):
    """A picture with its caption, and a text."""
    lines = [{"image": "1.jpg", "text": "red"}, {"text": "blue"}]
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_duplicates_of_an_earlier_source_go(folder, tmp_path):
    again = tmp_path / "again.jsonl"
    lines = (folder / "records.jsonl").read_text().splitlines()
    again.write_text("\n".join([lines[0], lines[10], json.dumps({"text": "other words " * 40})]))
    sources = (str(again), str(folder / "records.jsonl"))
    index = prepare_here(config_for(folder, tmp_path / "out", sources=sources, text=None))
    assert index["sources"] == [[sources[0], 3], [sources[1], 60]]
    samples = opened(tmp_path / "out")
    places = {sample.place for sample in samples}
    assert {"again.jsonl line 1", "again.jsonl line 2", "again.jsonl line 3"} <= places
    assert not {"records.jsonl line 1", "records.jsonl line 11"} & places


def test_statistics(folder, tmp_path):
    index = prepare_here(config_for(folder, tmp_path / "out", duplicates=None))
    samples = opened(tmp_path / "out")
    found = index["statistics"]
    assert found["samples"] == len(samples) == sum(index["shards"].values()) == 58
    assert found["tokens"] == sum(len(d.tokens) for sample in samples for d in sample.documents)
    assert found["images"] == found["tiles"] == 22
    assert found["samples_of_tiles"] == {"0": 36, "1": 22}
    assert sum(found["samples_of_up_to_tokens"].values()) == 58
    assert index["removed"] == {"duplicate": 0, "unusable": 2}


def test_what_was_done_before_an_error_is_not_done_again(folder, whole, tmp_path):
    config = config_for(folder, tmp_path / "out")
    ran = []

    def failing_after(count):
        def runner(tasks):
            for index, task in enumerate(tasks):
                if len(ran) == count:
                    raise OSError("no space left")
                ran.append(task.result)
                task.run()
                yield index

        return runner

    for count in (2, 4, 5, 7):
        with pytest.raises(OSError, match="no space"):
            run.prepare(config, failing_after(count))
        assert not (tmp_path / "out/index.json").exists()
    run.prepare(config, failing_after(None))
    assert len(ran) == len(set(ran)) == 4 + 1 + 3
    assert contents(tmp_path / "out") == contents(whole)
    run.prepare(config, failing_after(len(ran)))  # nothing is left to do


def test_outputs_of_something_else_are_left_alone(folder, whole, tmp_path):
    before = contents(whole)
    with pytest.raises(InputError, match="of other sources, models or settings"):
        prepare_here(config_for(folder, whole, seed=1))
    assert contents(whole) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(InputError, match="it is there"):
        prepare_here(config_for(folder, tmp_path / "mine"))
    with pytest.raises(InputError, match="all workers see"):
        prepare_here(config_for(folder, "gs://bucket/out"))


def test_damage_on_the_way_is_noticed(folder, tmp_path):
    def runner(tasks):
        for index, task in enumerate(tasks):
            if task.result.name.startswith("shard"):
                path = tmp_path / "out/unfinished/unit-000002.samples"
                path.write_bytes(bytes(path.stat().st_size))
            task.run()
            yield index

    with pytest.raises(InputError, match="damaged on the disk"):
        run.prepare(config_for(folder, tmp_path / "out"), runner)
    assert not list((tmp_path / "out").glob("*.unfinished"))


def test_nothing_left_is_an_error(folder, tmp_path):
    empty = tmp_path / "short.jsonl"
    empty.write_text(json.dumps({"text": "too short"}))
    with pytest.raises(InputError, match="nothing is left"):
        prepare_here(config_for(folder, tmp_path / "out", sources=(str(empty),)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sources": ()}, "give one at least"),
        ({"sources": ("a", "a")}, "twice"),
        ({"num_shards": 0}, "num_shards"),
        ({"max_tiles": 0}, "max_tiles"),
        ({"max_bad": 2.0}, "max_bad"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        PrepareConfig(**{"sources": ("a",), "output": "b", "tokenizer": "c", **changes})
    with pytest.raises(InputError):
        Duplicates(text_similarity=0.2)
    with pytest.raises(InputError):
        Duplicates(image_distance=40)


@pytest.mark.parametrize("source", ["easy-vqa/train", "charts/train/captions"])
def test_sources_of_the_package_need_no_preparation(source, folder, tmp_path):
    with pytest.raises(InputError, match=f"{source}.*comes with the package.*leave it out"):
        prepare_here(config_for(folder, tmp_path / "out", sources=(source,)))
    assert not (tmp_path / "out").exists()


def test_orders_are_permutations_that_never_change():
    order = shuffled(np.arange(8, dtype=np.uint64), seed=0)
    assert order.tolist() == shuffled(np.arange(8, dtype=np.uint64), seed=0).tolist()
    assert sorted(order) == list(range(8))
    for count, shards in ((0, 1), (5, 8), (100, 7)):
        ranges = bounds(count, shards)
        assert len(ranges) == shards and ranges[0][0] == 0 and ranges[-1][1] == count
        sizes = [stop - start for start, stop in ranges]
        assert max(sizes) - min(sizes) <= 1
