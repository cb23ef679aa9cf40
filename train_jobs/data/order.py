"""Which rows make up which step: a pure function, so that a position in the data is a number.

Samples are numbered through all epochs: sample ``g`` is row ``permutation(epoch)[g % rows]`` of
epoch ``g // rows``. Optimiser step ``s`` owns the samples ``s * total`` up to ``(s + 1) * total``,
whatever the number of ranks; ranks only divide them.

Rows that are padded to each other are grouped by length: within each WINDOW steps of an epoch's
permutation, steps hold rows of about equal length, and come in random order. A step then pads
little, every row still comes once an epoch, and ``batch.total`` is still a number of rows.

Ranks wait for each other in every micro-step. So the rows of a step, whichever they are, are dealt
out by the work that they make: the heaviest to one rank, the lightest to the same.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    """Return the order of ``rows`` rows in one epoch."""
    order = list(range(rows))
    # A text seed is hashed with SHA-512, the same on every machine and Python version we run on
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


WINDOW = 16
"""Steps whose rows are sorted together: lengths in a step then differ by a 16th of their range."""


def grouped(
    order: Sequence[int], lengths: Sequence[int], total: int, head: int, seed: str
) -> tuple[int, ...]:
    """Return ``order`` with rows of about equal length in each step of ``total`` rows.

    The first ``head`` rows belong to a step that another epoch began. They, and those of a step
    that the next epoch will fill, stay in their place: that step has rows of all lengths.
    """
    whole = head + (len(order) - head) // total * total
    made = list(order[:head])
    for start in range(head, whole, WINDOW * total):
        window = sorted(order[start : min(whole, start + WINDOW * total)], key=lengths.__getitem__)
        steps = [window[at : at + total] for at in range(0, len(window), total)]
        random.Random(f"{seed}/{start}").shuffle(steps)
        made += [row for step in steps for row in step]
    return (*made, *order[whole:])


class Seat(NamedTuple):
    """One row at its place in a run."""

    row: int
    epoch: int


@dataclass(frozen=True)
class Order:
    """The order of a whole run. ``epochs`` or ``steps`` ends it, exactly one of them."""

    rows: int
    total: int
    """Rows of one optimiser step over all ranks."""
    seed: int
    epochs: int | None = None
    max_steps: int | None = None
    lengths: tuple[int, ...] | None = field(default=None, repr=False)
    """Tokens of each row, where rows of one micro-batch are padded to the longest of them: rows of
    about equal length then come in one step, and are dealt out in it by length."""
    work: tuple[int, ...] | None = field(default=None, repr=False)
    """About what each row costs a rank, in any unit, where rows are packed and not padded."""
    _epochs: dict[int, tuple[int, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def steps(self) -> int:
        """Optimiser steps of the run; the last one of ``epochs`` may be short."""
        if self.epochs is None:
            assert self.max_steps is not None, "the configuration gives epochs or steps"
            return self.max_steps
        return -(-self.rows * self.epochs // self.total)

    @property
    def epochs_done(self) -> float:
        """How often each row is seen."""
        return self.epochs or self.steps * self.total / self.rows

    def step(self, step: int) -> tuple[Seat | None, ...]:
        """Return the ``total`` rows of one step; None is a place past the last epoch."""
        first = step * self.total
        return tuple(self._seat(g) for g in range(first, first + self.total))

    def micro_batches(
        self, step: int, rank: int, world: int, micro: int
    ) -> list[tuple[Seat | None, ...]]:
        """Return what one rank runs in one step: its micro-batches of ``micro`` rows, in order."""
        seats, stride = self._dealt(self.step(step)), micro * world
        assert len(seats) % stride == 0, "the configuration checks that the batch divides"
        if self.work is not None:
            return [
                snake(seats[start : start + stride], rank, world)
                for start in range(0, len(seats), stride)
            ]
        starts = range(rank * micro, len(seats), stride)
        return [seats[start : start + micro] for start in starts]

    def _dealt(self, seats: tuple[Seat | None, ...]) -> tuple[Seat | None, ...]:
        if (work := self.work) is not None:
            return tuple(sorted(seats, key=lambda seat: -work[seat.row] if seat else 1))
        if (lengths := self.lengths) is None:
            return seats
        return tuple(sorted(seats, key=lambda seat: lengths[seat.row] if seat else sys.maxsize))

    def _seat(self, sample: int) -> Seat | None:
        epoch, place = divmod(sample, self.rows)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        return Seat(self._epoch(epoch)[place], epoch)

    def _epoch(self, epoch: int) -> tuple[int, ...]:
        if self.lengths is None:
            return permutation(self.seed, epoch, self.rows)
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # all but the smallest data: a step touches two at most
                self._epochs.clear()
            order = permutation(self.seed, epoch, self.rows)
            head = min(self.rows, -epoch * self.rows % self.total)
            seed = f"{self.seed}/{epoch}"
            self._epochs[epoch] = grouped(order, self.lengths, self.total, head, seed)
        return self._epochs[epoch]


def snake(seats: Sequence[Seat | None], rank: int, world: int) -> tuple[Seat | None, ...]:
    """Return a rank's share of seats in falling order of work, dealt to 0, 1, 2, 2, 1, 0, 0 ..."""
    rounds = range(len(seats) // world)
    return tuple(seats[n * world + (world - 1 - rank if n % 2 else rank)] for n in rounds)
