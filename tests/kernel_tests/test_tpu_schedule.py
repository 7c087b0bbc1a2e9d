"""The lists of pairs of blocks that the TPU kernels run along, against plain loops."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from l32jax.kernels.tpu.schedule import (
    CLOSES,
    DONE,
    FINAL,
    FLAG_BITS,
    FRESH,
    KEY_BITS,
    OPENS,
    PARTLY,
    ROW_BITS,
    RUN_CLOSES,
    RUN_OPENS,
    WHOLE,
    Blocks,
    key_block,
    row_block,
    schedule,
)
from tests.kernel_tests import cases
from tests.kernel_tests.cases import MASKS, Mask

planned = jax.jit(schedule, static_argnames=("num_keys", "blocks", "parts"))
EVERY_FLAG = (1 << FLAG_BITS) - 1


class Problem(NamedTuple):
    """Each is a compilation; intervals are free."""

    b: int
    t: int
    s: int
    blocks: Blocks
    parts: int


PROBLEMS = [
    Problem(b=1, t=12, s=24, blocks=Blocks(2, 4, 2), parts=1),
    Problem(b=2, t=11, s=21, blocks=Blocks(2, 4, 2), parts=2),
    Problem(b=2, t=7, s=5, blocks=Blocks(3, 2, 1), parts=1),
    Problem(b=1, t=20, s=9, blocks=Blocks(4, 2, 2), parts=2),
    Problem(b=1, t=1, s=17, blocks=Blocks(2, 4, 4), parts=1),
    Problem(b=3, t=13, s=7, blocks=Blocks(1, 4, 1), parts=2),
]


class Case(NamedTuple):
    problem: Problem
    mask: Mask

    def intervals(self):
        return self.mask.intervals(*self.problem[:3])

    def plan(self):
        _, _, num_keys, blocks, parts = self.problem
        return planned(*self.intervals(), num_keys=num_keys, blocks=blocks, parts=parts)

    def visible(self):
        """Which keys each row of each block sees [b row_blocks key_blocks rows keys].

        Rows and keys that fill up the last blocks see nothing and are not seen.
        """
        _, t, s, (rows, keys, _), _ = self.problem
        sees = cases.visible(*self.intervals(), s)
        sees = np.pad(sees, ((0, 0), (0, -t % rows), (0, -s % keys)))
        batch, num_rows, num_keys = sees.shape
        return sees.reshape(batch, num_rows // rows, rows, -1, keys).swapaxes(2, 3)


def meeting(case: Case) -> np.ndarray:
    """Which blocks of keys lie within what some row of a block sees: [b row_blocks key_blocks]."""
    seen = case.visible().any(axis=(3, 4))
    since = np.maximum.accumulate(seen, axis=2)
    until = np.flip(np.maximum.accumulate(np.flip(seen, 2), axis=2), 2)
    return since & until


class List(NamedTuple):
    """The places of one list that hold something, and what follows them."""

    batch: int
    output: np.ndarray  # blocks of rows, or of keys in the list by keys
    other: np.ndarray
    flags: np.ndarray
    past: np.ndarray

    def has(self, flag: int) -> np.ndarray:
        return (self.flags & flag) != 0

    @property
    def meets(self) -> np.ndarray:
        return self.has(WHOLE | PARTLY)


def lists(case: Case, by: str) -> list[List]:
    plan = case.plan()
    words = np.asarray({"rows": plan.by_rows, "keys": plan.by_keys}[by])
    return [read(line, which // plan.parts, by) for which, line in enumerate(words)]


def read(line: np.ndarray, batch: int, by: str) -> List:
    size = int(((line & EVERY_FLAG) != 0).sum())
    held = line[:size]
    blocks = (row_block(held), key_block(held))
    output, other = blocks if by == "rows" else blocks[::-1]
    return List(batch, output, other, held & EVERY_FLAG, line[size:])


def edges(values: np.ndarray) -> tuple[list, list]:
    """Where stretches of equal values begin, and where they end."""
    changes, some = values[1:] != values[:-1], [True][: len(values)]
    return [*some, *changes], [*changes, *some]


CASES = st.builds(Case, st.sampled_from(PROBLEMS), MASKS)
BOTH = pytest.mark.parametrize("by", ["rows", "keys"])


def for_all(test):
    """Every problem once with nothing to see at all, then whatever is found."""
    for problem in PROBLEMS:
        test = example(case=Case(problem, Mask("nothing")))(test)
    return settings(max_examples=150)(given(case=CASES)(test))


@BOTH
@for_all
def test_every_pair_that_meets_is_listed_once(case, by):
    listed = np.zeros_like(meeting(case), int)
    for each in lists(case, by):
        pairs = (each.output, each.other) if by == "rows" else (each.other, each.output)
        np.add.at(listed[each.batch], tuple(index[each.meets] for index in pairs), 1)
    np.testing.assert_array_equal(listed, meeting(case))
    assert (listed >= case.visible().any(axis=(3, 4))).all()


@BOTH
@for_all
def test_a_pair_is_whole_where_all_rows_see_all_keys(case, by):
    all_see = case.visible().all(axis=(3, 4))
    for each in lists(case, by):
        pairs = (each.output, each.other) if by == "rows" else (each.other, each.output)
        whole = all_see[each.batch][pairs]
        np.testing.assert_array_equal(each.has(WHOLE)[each.meets], whole[each.meets])
        np.testing.assert_array_equal(each.has(PARTLY)[each.meets], ~whole[each.meets])


@BOTH
@for_all
def test_every_output_block_is_opened_and_closed_once_by_one_part(case, by):
    batch, *counts = meeting(case).shape
    opened, closed = np.zeros((2, batch, counts[by == "keys"]), int)
    for each in lists(case, by):
        np.add.at(opened[each.batch], each.output[each.has(OPENS)], 1)
        np.add.at(closed[each.batch], each.output[each.has(CLOSES)], 1)
        begins, ends = edges(each.output)
        assert each.has(OPENS).tolist() == begins
        assert each.has(CLOSES).tolist() == ends
    assert (opened == 1).all() and (closed == 1).all()


@BOTH
@for_all
def test_blocks_that_meet_nothing_stand_alone_at_the_end_and_load_nothing(case, by):
    meets = meeting(case) if by == "rows" else meeting(case).swapaxes(1, 2)
    for each in lists(case, by):
        num_meeting = int(each.meets.sum())
        assert each.meets[:num_meeting].all()
        lonely = each.output[num_meeting:]
        assert not meets[each.batch][lonely].any()
        if num_meeting:
            assert (each.other[num_meeting:] == each.other[num_meeting - 1]).all()


@BOTH
@for_all
def test_lists_are_as_long_as_they_need_and_then_stand_still(case, by):
    plan, found = case.plan(), lists(case, by)
    lengths = {"rows": plan.num_by_rows, "keys": plan.num_by_keys}[by]
    meets = meeting(case) if by == "rows" else meeting(case).swapaxes(1, 2)
    assert lengths.ravel().tolist() == [len(each.output) for each in found]
    assert lengths.sum() == meets.sum() + (~meets.any(axis=2)).sum()
    for each in found:
        assert not (each.past & EVERY_FLAG).any()
        blocks = (each.output, each.other) if by == "rows" else (each.other, each.output)
        for rest, held in (row_block(each.past), blocks[0]), (key_block(each.past), blocks[1]):
            assert (rest == (held if held.size else rest)[-1:]).all()


@for_all
def test_runs_are_stretches_of_one_block_of_rows(case):
    for each in lists(case, "keys"):
        rows, flags = each.other[each.meets], each.flags[each.meets]
        begins, ends = edges(rows)
        assert (flags & RUN_OPENS > 0).tolist() == begins
        assert (flags & RUN_CLOSES > 0).tolist() == ends
        assert np.flatnonzero(flags & FINAL).tolist() == [len(rows) - 1][: len(rows)]
        assert not (each.flags[~each.meets] & ~(OPENS | CLOSES)).any()


@for_all
def test_a_gradient_is_fresh_at_its_first_visit_in_each_part_and_done_at_its_last(case):
    for each, visited in zip(lists(case, "keys"), np.asarray(case.plan().visited), strict=True):
        rows, flags = each.other[each.meets], each.flags[each.meets]
        first = {row: place for place, row in reversed(list(enumerate(rows)))}
        last = {row: place for place, row in enumerate(rows)}
        assert np.flatnonzero(flags & FRESH).tolist() == sorted(first.values())
        assert np.flatnonzero(flags & DONE).tolist() == sorted(last.values())
        assert np.flatnonzero(visited).tolist() == sorted(first)


def test_a_packed_row_lists_about_as_many_pairs_as_its_documents_need():
    row = np.arange(4096)[None].astype(np.int32)
    plan = planned(row // 64 * 64, row + 1, num_keys=4096, blocks=Blocks(16, 32, 8), parts=1)
    # Documents of 4 blocks of rows and 2 of keys: 2 + 4 pairs of 8 meet, of 64 documents.
    assert plan.num_by_rows == plan.num_by_keys == 64 * 6
    assert plan.by_rows.shape == (1, 256 * 128)


@pytest.mark.parametrize(
    ("num_rows", "parts", "message"),
    [((1 << ROW_BITS) + 1, 1, "split rows over more devices"), (4, 2, "one would be empty")],
)
def test_what_lists_cannot_hold_is_refused(num_rows, parts, message):
    def made(row):
        return schedule(row, row, num_keys=8, blocks=Blocks(1, 8, 8), parts=parts)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(made, jax.ShapeDtypeStruct((1, num_rows), np.int32))


def test_a_full_word_keeps_its_sign():
    assert ROW_BITS + KEY_BITS + FLAG_BITS < 32
