"""Which rows make up which step: a pure function, so that a position in the data is a number.

Samples are numbered through all epochs: sample ``g`` is row ``permutation(epoch)[g % rows]`` of
epoch ``g // rows``. Optimiser step ``s`` owns the samples ``s * total`` up to ``(s + 1) * total``,
whatever the number of ranks; ranks only divide them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    """Return the order of ``rows`` rows in one epoch."""
    order = list(range(rows))
    # A text seed is hashed with SHA-512, the same on every machine and Python version we run on
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


@dataclass(frozen=True)
class Order:
    """The order of a whole run. ``epochs`` or ``steps`` ends it, exactly one of them."""

    rows: int
    total: int
    """Rows of one optimiser step over all ranks."""
    seed: int
    epochs: int | None = None
    max_steps: int | None = None

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

    def step(self, step: int) -> tuple[int | None, ...]:
        """Return the ``total`` row numbers of one step; None is a place past the last epoch."""
        first = step * self.total
        return tuple(self._row(g) for g in range(first, first + self.total))

    def micro_batches(
        self, step: int, rank: int, world: int, micro: int
    ) -> list[tuple[int | None, ...]]:
        """Return what one rank runs in one step: its micro-batches of ``micro`` rows, in order."""
        rows = self.step(step)
        stride = micro * world
        assert len(rows) % stride == 0, "the configuration checks that the batch divides"
        starts = range(rank * micro, len(rows), stride)
        return [rows[start : start + micro] for start in starts]

    def _row(self, sample: int) -> int | None:
        epoch, place = divmod(sample, self.rows)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        return permutation(self.seed, epoch, self.rows)[place]
