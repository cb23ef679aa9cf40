"""Figures that follow from sums over the examples: counted once, added up as often as is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sums(Generic[Item]):
    """A score of some items. A bootstrap adds up what was counted, and counts no item again."""

    counts: Callable[[Item], Sequence[float]]
    """What one item adds: always as many numbers."""
    figures: Callable[[Sequence[float]], dict[str, float]]
    """From the sums of those to the figures."""

    def __call__(self, items: Iterable[Item]) -> dict[str, float]:
        """Return the figures of ``items``."""
        return self.figures(added(map(self.counts, items)))


def added(rows: Iterable[Sequence[float]]) -> list[float]:
    """Return the sum of each column of rows, which are equally long; nothing where there are none.

    Exact but for the last rounding, so that the order of the rows does not matter.
    """
    return [math.fsum(column) for column in zip(*rows, strict=True)]
