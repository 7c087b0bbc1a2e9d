import hashlib

import grain
import jax
import numpy as np
import pytest

from l32jax.config import MeshConfig, VisionConfig
from l32jax.data.batches import Mixture, make_batches, place
from l32jax.data.samples import Sample, VisionShape, make_row, stack
from l32jax.errors import InputError
from l32jax.sharding import make_mesh

RECORDS = list(range(1, 24))
VISION = VisionShape(
    encoder=VisionConfig(image_size=28, num_local_layers=3, taps=(1, 2)),
    image_id=99,
    max_images=1,
    slots=4,
    max_tiles=4,
)


def row(record: int, rng: np.random.Generator):
    tokens = [record, int(rng.integers(1, 1000))]
    return make_row([Sample.single(tokens, [1.0, 1.0])], length=4)


def batches_of(source=RECORDS, *, batch_size=4, seed=0, **options):
    return make_batches(source, make_row=row, batch_size=batch_size, seed=seed, **options)


def take(batches, count: int) -> list:
    return [next(batches) for _ in range(count)]


def digest(batches) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.items()):
            digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def records_in(batches) -> list[int]:
    return [int(record) for batch in batches for record in batch["tokens"][:, 0] if record]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_seed_and_step_decide_every_batch(prefetch):
    first = digest(take(batches_of(prefetch=prefetch), 20))
    assert first == digest(take(batches_of(), 20))
    assert first != digest(take(batches_of(seed=1), 20))


def test_an_epoch_shows_each_record_once_in_an_order_of_its_own():
    batches = batches_of(batch_size=23)
    epochs = [records_in([batch]) for batch in take(batches, 3)]
    assert all(sorted(epoch) == RECORDS for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_runs_of_neighbouring_seeds_share_no_epoch():
    orders = [
        tuple(records_in([batch]))
        for seed in range(3)
        for batch in take(batches_of(batch_size=23, seed=seed), 3)
    ]
    assert len(set(orders)) == 9


def test_a_record_has_new_random_numbers_in_every_epoch():
    first, second = take(batches_of([7], batch_size=1), 2)
    assert first["tokens"][0, 1] != second["tokens"][0, 1]


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_resuming_equals_never_stopping(steps):
    batches = batches_of()
    take(batches, steps)
    state = batches.get_state()
    expected = digest(take(batches, 9))
    resumed = batches_of()
    take(resumed, 2)  # a fresh iterator need not be at its beginning
    resumed.set_state(state)
    assert digest(take(resumed, 9)) == expected


@pytest.mark.parametrize("epochs", [1, 2])
def test_processes_see_the_batches_of_a_single_one_between_them(epochs):
    whole = list(batches_of(num_epochs=epochs))
    parts = [
        list(batches_of(num_epochs=epochs, process_index=index, process_count=2))
        for index in range(2)
    ]
    joined = [
        {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        for blocks in zip(*parts, strict=True)
    ]
    assert len(joined) == len(whole) == -(-23 * epochs // 4)
    assert digest(joined) == digest(whole)


def test_shards_partition_the_epoch():
    parts = [
        records_in(batches_of(num_epochs=1, process_index=i, process_count=2)) for i in range(2)
    ]
    assert sorted(parts[0] + parts[1]) == RECORDS


def test_another_number_of_processes_resumes_where_one_stopped():
    single = batches_of()
    take(single, 3)
    state = single.get_state()
    (expected,) = take(single, 1)
    parts = [batches_of(process_index=i, process_count=4) for i in range(4)]
    for part in parts:
        part.set_state(state)
    blocks = [next(part)["tokens"] for part in parts]
    assert np.array_equal(np.concatenate(blocks), expected["tokens"])


def test_a_finite_pass_ends_with_empty_rows():
    batches = list(batches_of(num_epochs=1, shuffle=False))
    assert len(batches) == 6
    assert records_in(batches) == RECORDS
    last = batches[-1]
    assert all(array.shape[0] == 4 for array in last.values())
    assert not any(array[3].any() for array in last.values())


def test_a_mixture_takes_rows_in_proportion_to_the_weights():
    mixture = Mixture([[1] * 5, [2] * 3], [3.0, 1.0])
    records = records_in(take(batches_of(mixture), 20))
    assert (records.count(1), records.count(2)) == (60, 20)
    assert digest(take(batches_of(mixture), 5)) == digest(take(batches_of(mixture), 5))


def test_a_mixture_resumes_too():
    batches = batches_of(Mixture([RECORDS, [50, 60]], [2.0, 1.0]))
    take(batches, 5)
    resumed = batches_of(Mixture([RECORDS, [50, 60]], [2.0, 1.0]))
    resumed.set_state(batches.get_state())
    assert digest(take(resumed, 9)) == digest(take(batches, 9))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"batch_size": 8}, {"shuffle": False}, {"source": [1, 2]}]
)
def test_a_state_of_other_data_is_refused(other):
    with pytest.raises(InputError, match="it belongs to"):
        batches_of(**other).set_state(batches_of().get_state())


@pytest.mark.parametrize("state", [b"", b"\xff", b"[]", b"{}", b"3"])
def test_a_damaged_state_is_an_input_error(state):
    with pytest.raises(InputError, match="damaged"):
        batches_of().set_state(state)


@pytest.mark.parametrize("place", [b'{"next_index": -1}', b'{"next_index": "x"}', b"{}", b"3"])
def test_a_state_that_points_nowhere_is_an_input_error(place):
    batches = batches_of()
    state = batches.get_state().replace(b'{"next_index": 0}', place)
    with pytest.raises(InputError, match="damaged"):
        batches.set_state(state)


@pytest.mark.parametrize(
    ("source", "options", "why"),
    [
        (RECORDS, {"batch_size": 5, "process_count": 2}, "multiple of the 2 processes"),
        (RECORDS, {"batch_size": 0}, "batch_size=0"),
        ([], {}, "there are none"),
        (Mixture([RECORDS], [1.0]), {"num_epochs": 1}, "num_epochs of a mixture"),
    ],
)
def test_impossible_settings_are_input_errors(source, options, why):
    with pytest.raises(InputError, match=why):
        batches_of(source, **options)


def test_a_mixture_needs_a_positive_weight_for_each_source():
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(InputError, match="each source needs a positive one"):
            Mixture([[1], [2]], weights)


def test_sources_of_grain_are_sources():
    source = grain.sources.RangeDataSource(1, 24, 1)
    assert digest(take(batches_of(source), 5)) == digest(take(batches_of(), 5))


def test_an_error_of_a_row_reaches_the_reader():
    with pytest.raises(InputError, match="2 tokens in a row: it holds 1"):
        next(
            make_batches(
                RECORDS,
                make_row=lambda record, rng: make_row(
                    [Sample.single([record, 1], [1.0, 1.0])], length=1
                ),
                batch_size=1,
                seed=0,
            )
        )


def test_closing_stops_the_reader():
    batches = batches_of()
    next(batches)
    batches.close()
    with pytest.raises(ValueError):
        next(batches)


def test_placed_batches_are_sharded_over_their_rows():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    picture = np.full((30, 40, 3), 200, np.uint8)
    rows = [
        make_row([Sample.single([99, n], [0.0, 1.0], [picture])], length=4, vision=VISION)
        for n in range(8)
    ]
    local = stack(rows)
    placed = place(local, mesh)
    assert placed.keys() == local.keys()
    for name, array in placed.items():
        assert array.sharding.spec[0] == ("data", "fsdp")
        assert array.addressable_shards[0].data.shape[0] == 2
        assert np.array_equal(jax.device_get(array), local[name])


def test_a_context_axis_gives_each_device_an_early_chunk_and_a_late_one():
    tokens = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    placed = place({"tokens": tokens}, mesh)["tokens"]
    held = sorted(
        {tuple(np.asarray(shard.data)[0].tolist()) for shard in placed.addressable_shards}
    )
    assert held == [(0, 1, 14, 15), (2, 3, 12, 13), (4, 5, 10, 11), (6, 7, 8, 9)]
    with pytest.raises(
        InputError, match="length=12 of a row: a context axis of 4 needs a multiple"
    ):
        place({"tokens": tokens[:, :12]}, mesh)
