import dataclasses
import hashlib
import json
import logging

import jax
import numpy as np
import pytest

from l32jax.config import MeshConfig
from l32jax.data.batches import make_batches, place
from l32jax.data.packing import RowShape
from l32jax.data.records import Bad
from l32jax.data.rows import make_row, stack
from l32jax.data.samples import Sample
from l32jax.data.streams import Rows, in_turn, make_streams
from l32jax.errors import InputError
from l32jax.sharding import make_mesh
from tests.data_tests.pictures import IMAGE_ID, VISION, png, samples

RECORDS = samples(60)
SHAPE = RowShape(length=64, vision=VISION)


def batches_of(*sources, weights=None, batch_size=4, seed=0, rows=None, **options):
    sources = sources or (RECORDS,)
    return make_batches(
        sources,
        weights or [1.0] * len(sources),
        rows or Rows(shape=SHAPE, open_rows=4),
        batch_size=batch_size,
        seed=seed,
        **options,
    )


def alone(length: int = 4) -> Rows:
    return Rows(shape=RowShape(length=length), packing="none")


def words(*numbers: int) -> list[Sample]:
    """A sample of two tokens for each number; the first token is the number."""
    return [Sample.single([number, 1], [1.0, 1.0]) for number in numbers]


def take(batches, count: int) -> list:
    return [next(batches) for _ in range(count)]


def digest(batches) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.items()):
            digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def joined(parts) -> list:
    """The batches of several processes as one."""
    return [
        {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        for blocks in zip(*parts, strict=True)
    ]


def first_tokens(batches) -> list[int]:
    return [int(token) for batch in batches for token in batch["tokens"][:, 0]]


@pytest.fixture(scope="module")
def expected() -> list:
    return take(batches_of(), 30)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_seed_and_step_decide_every_batch(prefetch, expected):
    assert digest(take(batches_of(prefetch=prefetch), 30)) == digest(expected)
    assert digest(take(batches_of(seed=1), 30)) != digest(expected)


def test_rows_hold_several_samples_and_every_kind_of_them(expected):
    documents = [
        row["positions"][row["stop"] > 0] == 0 for batch in expected for row in rows_of(batch)
    ]
    assert np.mean([starts.sum() for starts in documents]) > 2
    images = [
        (row["aspect"].prod(axis=-1) > 0).sum() for batch in expected for row in rows_of(batch)
    ]
    assert {1, 2, 3, 4} <= set(map(int, images))


def rows_of(batch) -> list:
    return [{name: array[i] for name, array in batch.items()} for i in range(len(batch["tokens"]))]


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_resuming_equals_never_stopping(steps, expected):
    batches = batches_of()
    take(batches, steps)
    state = batches.get_state()
    resumed = batches_of()
    take(resumed, 2)  # a fresh iterator need not be at its beginning
    resumed.set_state([state])
    assert digest(take(resumed, 9)) == digest(expected[steps : steps + 9])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_see_the_batches_of_a_single_one_between_them(count, expected):
    parts = [take(batches_of(process_index=i, process_count=count), 6) for i in range(count)]
    assert digest(joined(parts)) == digest(expected[:6])


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 1), (4, 2)])
def test_another_number_of_processes_goes_on_where_one_stopped(before, after, expected):
    parts = [batches_of(process_index=i, process_count=before) for i in range(before)]
    for part in parts:
        take(part, 5)
    states = [part.get_state() for part in parts]
    resumed = [batches_of(process_index=i, process_count=after) for i in range(after)]
    for part in resumed:
        part.set_state(states)
    assert digest(joined([take(part, 4) for part in resumed])) == digest(expected[5:9])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_make_the_same_rows_and_leave_the_same_state(workers, expected):
    batches = batches_of(workers=workers)
    assert digest(take(batches, 5)) == digest(expected[:5])
    state = batches.get_state()
    batches.close()
    resumed = batches_of()
    resumed.set_state([state])
    assert digest(take(resumed, 3)) == digest(expected[5:8])


def test_an_epoch_shows_each_record_once_in_an_order_of_its_own():
    batches = batches_of(words(*range(1, 24)), rows=alone(), batch_size=23)
    epochs = [first_tokens([batch]) for batch in take(batches, 3)]
    assert all(sorted(epoch) == list(range(1, 24)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_runs_of_neighbouring_seeds_share_no_epoch():
    options = {"rows": alone(), "batch_size": 23}
    orders = [
        tuple(first_tokens([batch]))
        for seed in range(3)
        for batch in take(batches_of(words(*range(1, 24)), seed=seed, **options), 3)
    ]
    assert len(set(orders)) == 9


def test_a_record_has_new_random_numbers_in_every_epoch():
    def change(sample, rng):
        return Sample.single([int(rng.integers(1, 1000)), 1], [1.0, 1.0])

    rows = dataclasses.replace(alone(), change=change)
    first, second = take(batches_of(words(7), rows=rows, batch_size=1), 2)
    assert first["tokens"][0, 0] != second["tokens"][0, 0]


def test_a_mixture_takes_samples_in_proportion_to_the_weights():
    batches = batches_of(words(*[1] * 5), words(*[2] * 3), weights=[3.0, 1.0], rows=alone())
    records = first_tokens(take(batches, 20))
    assert (records.count(1), records.count(2)) == (60, 20)


def test_unusable_records_are_skipped_counted_and_told_once(caplog):
    broken = [png(40, 40)[:80]]
    source = [
        *RECORDS[:20],
        Bad("train.jsonl line 21", "not UTF-8"),
        dataclasses.replace(
            Sample.single([1, IMAGE_ID, 2], [0.0, 0.0, 1.0], broken), place="train.jsonl line 22"
        ),
    ]
    with caplog.at_level(logging.WARNING):
        batches = batches_of(source, max_bad=1.0)
        take(batches, 20)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "skipped train.jsonl line 21: not UTF-8" in told
    assert any("train.jsonl line 22: image" in line and "damaged" in line for line in told)
    assert batches.bad > 2
    share = batches.bad / (batches.bad + batches.used)
    assert abs(share - 2 / 22) < 0.02


def test_a_broken_picture_costs_its_own_sample_only():
    good = Sample.single([5, 6, 7], [1.0] * 3)
    bad = Sample.single([1, IMAGE_ID, 2], [0.0, 0.0, 1.0], [png(40, 40)[:80]])
    rows = Rows(shape=RowShape(length=9, vision=VISION), open_rows=2)
    batches = batches_of([good, bad], rows=rows, batch_size=1, max_bad=1.0)
    assert {int(t) for row in take(batches, 6) for t in row["tokens"].ravel()} <= {0, 5, 6, 7}
    assert batches.bad and batches.used


def test_too_many_unusable_records_fail_the_run():
    source = [*RECORDS[:8], Bad("a.tar 0007", "no image")]
    with pytest.raises(InputError, match=r"a.tar 0007: no image.*max_bad=0.001"):
        take(batches_of(source, max_bad=0.001), 50)
    with pytest.raises(InputError, match="1000 unusable records in a row.* x: y; mend the"):
        take(batches_of([Bad("x", "y")], max_bad=1.0), 1)


def test_counts_go_on_after_a_restart():
    source = [*RECORDS[:8], Bad("a.tar 0007", "no image")]
    batches = batches_of(source, max_bad=1.0)
    take(batches, 10)
    resumed = batches_of(source, max_bad=1.0)
    resumed.set_state([batches.get_state()])
    assert (resumed.used, resumed.bad) == (batches.used, batches.bad)


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch_size": 8}, {"rows": alone()}])
def test_a_state_of_other_data_is_refused(other):
    with pytest.raises(InputError, match="another order of records .* was "):
        batches_of(**other).set_state([batches_of().get_state()])


@pytest.mark.parametrize("state", [b"", b"\xff", b"[]", b"{}", b"3"])
def test_a_damaged_state_is_an_input_error(state):
    with pytest.raises(InputError, match="damaged"):
        batches_of().set_state([state])


@pytest.mark.parametrize("place", ['{"parent": {}}', "{}", "3", "x", '{"next_row": "a"}'])
def test_a_state_that_points_nowhere_is_an_input_error(place):
    batches = batches_of()
    take(batches, 1)
    state = json.loads(batches.get_state())
    state["streams"]["2"] = place
    with pytest.raises(InputError, match="damaged"):
        batches.set_state([json.dumps(state).encode()])
        next(batches)


def test_a_state_without_some_of_the_streams_is_an_input_error():
    half = batches_of(process_index=0, process_count=2)
    next(half)
    with pytest.raises(InputError, match="damaged"):
        batches_of().set_state([half.get_state()])


@pytest.mark.parametrize(
    ("sources", "options", "why"),
    [
        ([RECORDS], {"batch_size": 5, "process_count": 2}, "multiple of the 2 processes"),
        ([RECORDS], {"batch_size": 0}, "batch_size=0"),
        ([[]], {}, "there are none"),
        ([RECORDS], {"weights": [0.0]}, "each source needs a positive one"),
        ([RECORDS, RECORDS], {"weights": [1.0]}, "each source needs a positive one"),
    ],
)
def test_impossible_settings_are_input_errors(sources, options, why):
    with pytest.raises(InputError, match=why):
        batches_of(*sources, **options)


def test_closing_stops_the_reader_and_it_can_go_on(expected):
    batches = batches_of()
    take(batches, 3)
    batches.close()
    assert digest(take(batches, 2)) == digest(expected[3:5])


def test_placed_batches_are_sharded_over_their_rows():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    picture = np.full((30, 40, 3), 200, np.uint8)
    rows = [
        make_row([Sample.single([IMAGE_ID, n], [0.0, 1.0], [picture])], length=4, vision=VISION)
        for n in range(8)
    ]
    local = stack(rows)
    placed = place(local, mesh)
    assert placed.keys() == local.keys()
    for name, array in placed.items():
        assert array.sharding.spec[0] == ("data", "fsdp")
        assert array.addressable_shards[0].data.shape[0] == 2
        assert np.array_equal(jax.device_get(array), local[name])


class Counted(list):
    """Samples that tell how often one was read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("processes", [1, 4])
def test_streams_read_at_different_steps(processes):
    """If all filled their open rows at once, devices would wait for that again and again."""
    count, open_rows = 32, 16
    source = Counted(words(*range(500)))
    rows = Rows(shape=RowShape(length=8), open_rows=open_rows)
    streams = make_streams([source], [1.0], rows, count=count, seed=0)
    local = count // processes
    turns = iter(in_turn(dict(list(enumerate(streams))[-local:]), {}, workers=0))
    read = []
    for _ in range(10 * open_rows):
        before = source.reads
        for _ in range(local):
            next(turns)
        read.append((source.reads - before) / local)
    settled = read[3 * open_rows :]
    assert np.mean(settled) == pytest.approx(4, rel=0.1)  # samples of a row
    assert max(settled) < 4 * open_rows / 2
