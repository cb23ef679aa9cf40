from __future__ import annotations

import pytest

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
