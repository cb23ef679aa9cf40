"""How sure a figure is: intervals from resampling the examples it was measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from train_jobs.metrics.check import paired

Item = TypeVar("Item")
Figure = Callable[[Sequence[Item]], float]


@dataclass(frozen=True)
class Interval:
    """A figure, and where it would lie on other examples of the same kind."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A figure of one system minus that of another."""

    p: float
    """Two-sided: how often chance alone would give a difference as large, 0 to 1."""

    @property
    def real(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def interval(
    items: Sequence[Item],
    figure: Figure[Item],
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return ``figure`` of all items with its percentile interval.

    Efron, Annals of Statistics 7, 1979. The same seed gives the same interval. ValueError where
    there are no items.
    """
    paired(items, items)
    drawn = _resampled(len(items), draws, seed)
    values = sorted(figure([items[at] for at in places]) for places in drawn)
    return Interval(figure(items), *_middle(values, level))


def difference(
    ours: Sequence[Item],
    theirs: Sequence[Item],
    figure: Figure[Item],
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Return ``figure(ours) - figure(theirs)``, resampling the examples of both alike.

    The two must be the same examples in the same order (paired bootstrap, Koehn, W04-3250).
    """
    paired(ours, theirs)
    values = sorted(
        figure([ours[at] for at in drawn]) - figure([theirs[at] for at in drawn])
        for drawn in _resampled(len(ours), draws, seed)
    )
    below = sum(value <= 0 for value in values)
    above = sum(value >= 0 for value in values)
    p = min(1.0, 2 * (min(below, above) + 1) / (draws + 1))
    return Difference(figure(ours) - figure(theirs), *_middle(values, level), p)


def _resampled(count: int, draws: int, seed: int) -> Iterator[list[int]]:
    import numpy as np

    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield generator.integers(count, size=count).tolist()


def _middle(values: Sequence[float], level: float) -> tuple[float, float]:
    """Return the ends of the middle ``level`` of sorted values."""
    outside = (1 - level) / 2
    last = len(values) - 1
    return values[round(outside * last)], values[round((1 - outside) * last)]
