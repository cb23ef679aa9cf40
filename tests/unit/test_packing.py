from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_jobs.data.packing import fill_rate, pack

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=60)


@given(LENGTHS)
def test_tc17_every_document_is_in_exactly_one_row_and_none_is_cut(lengths: list[int]) -> None:
    rows = pack(lengths, 64)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in row) <= 64 for row in rows)


@given(LENGTHS)
def test_packing_depends_on_nothing_but_its_arguments(lengths: list[int]) -> None:
    assert pack(lengths, 64) == pack(list(lengths), 64)


@given(LENGTHS)
def test_no_two_rows_could_be_one_by_first_fit_bound(lengths: list[int]) -> None:
    # any best-fit packing stays below twice the sum, plus one row
    assert len(pack(lengths, 64)) <= 2 * sum(lengths) / 64 + 1


@given(LENGTHS)
def test_rows_are_those_of_the_definition(lengths: list[int]) -> None:
    """To the row: a run that goes on counts its steps in them."""
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    tight: list[list[int]] = []
    for number in order:
        rooms = [(64 - sum(lengths[n] for n in row), at) for at, row in enumerate(tight)]
        at = min(((free, at) for free, at in rooms if free >= lengths[number]), default=(0, -1))[1]
        if at < 0:
            tight.append([])
        tight[at].append(number)
    level: list[list[int]] = [[] for _ in tight]
    for number in order:
        load, at = min((sum(lengths[n] for n in row), at) for at, row in enumerate(level))
        if load + lengths[number] > 64:
            level = tight
            break
        level[at].append(number)
    assert pack(lengths, 64) == sorted(tuple(sorted(row)) for row in level)


def test_rows_are_filled_evenly() -> None:
    lengths = [10] * 13
    rows = pack(lengths, 64)
    loads = [sum(lengths[number] for number in row) for row in rows]
    assert len(rows) == 3
    assert max(loads) - min(loads) <= 10


def test_an_even_filling_that_fails_falls_back_to_the_tight_one() -> None:
    lengths = [5, 5, 4, 3, 3]  # evenly: 5 4 | 5 3, and no room for the last
    assert pack(lengths, 10) == [(0, 1), (2, 3, 4)]


@pytest.mark.parametrize("length", [0, 65])
def test_a_document_that_no_row_can_hold_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens"):
        pack([5, length], 64)


def test_fill_rate() -> None:
    assert fill_rate([30, 34, 32], rows=2, capacity=64) == 0.75
