from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_jobs.data.order import Order, permutation


def test_a_permutation_is_a_function_of_seed_and_epoch() -> None:
    assert permutation(0, 0, 8) == permutation(0, 0, 8)
    assert sorted(permutation(0, 0, 8)) == list(range(8))
    assert len({permutation(seed, epoch, 8) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_is_pinned() -> None:
    """A run that is resumed by a later release must see the rows in the order it began with."""
    assert permutation(0, 0, 8) == PINNED


PINNED = (0, 2, 1, 4, 6, 7, 3, 5)


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 1), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_tc04_a_step_holds_the_same_rows_at_every_world_size(world: int, micro: int) -> None:
    order = Order(rows=11, total=8, seed=3, epochs=2)
    for step in range(order.steps):
        shares = [order.micro_batches(step, rank, world, micro) for rank in range(world)]
        assert {len(share) for share in shares} == {8 // (world * micro)}
        rows = [row for share in shares for batch in share for row in batch]
        assert sorted(rows, key=str) == sorted(order.step(step), key=str)
        assert {seat.epoch for seat in rows if seat} <= {0, 1}


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 2), (4, 1), (2, 4)])
def test_tc04_rows_dealt_out_by_work_are_the_same_rows(world: int, micro: int) -> None:
    work = tuple(range(11))
    plain, dealt = (Order(11, total=8, seed=3, epochs=2, work=w) for w in (None, work))
    for step in range(plain.steps):
        assert dealt.step(step) == plain.step(step)
        shares = [dealt.micro_batches(step, rank, world, micro) for rank in range(world)]
        rows = [row for share in shares for batch in share for row in batch]
        assert sorted(rows, key=str) == sorted(plain.step(step), key=str)


def test_ranks_get_about_the_same_work_in_every_micro_step() -> None:
    rng = random.Random(0)
    work = tuple(rng.randint(512, 1024) for _ in range(64))

    def waiting(order: Order) -> int:
        lost = 0
        for step in range(order.steps):
            ranks = [order.micro_batches(step, rank, 2, 4) for rank in range(2)]
            for micros in zip(*ranks, strict=True):
                sums = [sum(work[seat.row] for seat in micro if seat) for micro in micros]
                lost += max(sums) - min(sums)
        return lost

    plain, dealt = (Order(64, total=16, seed=1, epochs=1, work=w) for w in (None, work))
    assert waiting(dealt) < 0.2 * waiting(plain)


def test_tc04_every_row_is_seen_once_an_epoch() -> None:
    order = Order(rows=11, total=4, seed=0, epochs=3)
    seen = [row for step in range(order.steps) for row in order.step(step)]
    assert order.steps == 9
    assert seen[33:] == [None] * 3
    for epoch in range(3):
        seats = [seat for seat in seen[epoch * 11 : (epoch + 1) * 11] if seat]
        assert sorted(seats) == [(row, epoch) for row in range(11)]


def test_a_run_by_steps_goes_on_through_the_epochs() -> None:
    order = Order(rows=3, total=2, seed=0, max_steps=5)
    assert order.steps == 5
    assert None not in [row for step in range(5) for row in order.step(step)]
    assert order.epochs_done == pytest.approx(10 / 3)


def lengths_of(rows: int) -> tuple[int, ...]:
    rng = random.Random(1)
    return tuple(rng.randint(4, 200) for _ in range(rows))


def by_length(rows: int, total: int, epochs: int, seed: int = 0) -> Order:
    return Order(rows, total, seed, epochs=epochs, lengths=lengths_of(rows))


@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 4))
def test_tc04_rows_grouped_by_length_still_come_once_an_epoch(
    rows: int, total: int, epochs: int
) -> None:
    order = by_length(rows, total, epochs)
    seats = [seat for step in range(order.steps) for seat in order.step(step) if seat]
    assert sorted(seats) == sorted((row, epoch) for epoch in range(epochs) for row in range(rows))
    # the epochs follow each other
    assert [seat.epoch for seat in seats] == sorted(seat.epoch for seat in seats)


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 2), (4, 1)])
def test_tc04_grouped_rows_of_a_step_are_the_same_at_every_world_size(
    world: int, micro: int
) -> None:
    order = by_length(101, 8, 2)
    for step in range(order.steps):
        shares = [order.micro_batches(step, rank, world, micro) for rank in range(world)]
        rows = [row for share in shares for batch in share for row in batch]
        assert sorted(rows, key=str) == sorted(order.step(step), key=str)


def padded(order: Order, micro: int) -> float:
    assert order.lengths
    cost = 0
    for step in range(order.steps):
        for batch in order.micro_batches(step, 0, 1, micro):
            found = [order.lengths[seat.row] for seat in batch if seat]
            cost += max(found, default=0) * len(found)
    return sum(order.lengths) * (order.epochs or 1) / cost


def test_batches_of_grouped_rows_pad_little() -> None:
    grouped = by_length(2000, 16, 2)
    assert padded(grouped, 16) > 0.9
    assert padded(grouped, 4) > 0.9


def test_steps_do_not_come_by_length() -> None:
    order = by_length(2000, 16, 1)
    assert order.lengths
    means = [
        sum(order.lengths[seat.row] for seat in order.step(step) if seat) for step in range(120)
    ]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)
    one, other = (by_length(99, 4, 1, seed) for seed in (1, 2))
    assert [one.step(step) for step in range(5)] != [other.step(step) for step in range(5)]


def test_the_grouped_order_is_pinned() -> None:
    """A run that is resumed by a later release must see the rows in the order it began with."""
    order = Order(6, 2, 0, epochs=2, lengths=(5, 1, 4, 2, 3, 6))
    assert [[seat.row for seat in order.step(step) if seat] for step in range(6)] == GROUPED
    fresh = Order(6, 2, 0, epochs=2, lengths=(5, 1, 4, 2, 3, 6))
    assert fresh.step(4) == order.step(4)


GROUPED = [[1, 3], [4, 2], [0, 5], [1, 3], [0, 5], [4, 2]]
