"""How sure a figure is: intervals from resampling the examples it was measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from train_jobs.metrics.check import paired
from train_jobs.metrics.sums import Sums

Item = TypeVar("Item")
Score = Callable[[Sequence[Item]], Mapping[str, float]]
"""Several figures of the same items, by name. Of a `Sums` each item is counted once."""
Places = Sequence[int]
"""Which items a resample consists of."""


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


def intervals(
    items: Sequence[Item],
    score: Score[Item],
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Interval]:
    """Return every figure of a score with its percentile interval; a resample is scored once.

    Efron, Annals of Statistics 7, 1979. The same seed gives the same intervals. ValueError where
    there are no items. A resample that lacks a figure, or has no number for it, is left out of
    that figure's interval. ``beat`` is called before each resample, and each item that is counted.
    """
    paired(items, items)
    scored = _scorer(items, score, beat)
    found: dict[str, list[float]] = {}
    for places in _resampled(len(items), draws, seed):
        beat()
        _add(found, scored(places))
    return {
        name: Interval(value, *_middle(sorted(found.get(name) or [value]), level))
        for name, value in score(items).items()
    }


def differences(
    ours: Sequence[Item],
    theirs: Sequence[Item],
    score: Score[Item],
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Return ``score(ours) - score(theirs)``, figure by figure, resampling both sides alike.

    The two must be of the same examples in the same order (paired bootstrap, Koehn, W04-3250).
    """
    paired(ours, theirs)
    mine, other = (_scorer(side, score) for side in (ours, theirs))
    found: dict[str, list[float]] = {}
    for places in _resampled(len(ours), draws, seed):
        _add(found, _minus(mine(places), other(places)))
    whole = _minus(score(ours), score(theirs))
    return {
        name: _difference(value, found.get(name) or [value], level) for name, value in whole.items()
    }


def _scorer(
    items: Sequence[Item], score: Score[Item], beat: Callable[[], None] = lambda: None
) -> Callable[[Places], Mapping[str, float]]:
    """Return what scores a resample: anew, or by adding up what each item was counted for."""
    if not isinstance(score, Sums):
        return lambda places: score([items[at] for at in places])
    import numpy as np

    def counted(item: Item) -> Sequence[float]:
        beat()
        return score.counts(item)

    # each row becomes numbers of 8 bytes at once: lists of all of them would take four times that
    columns = np.stack([np.asarray(counted(item), dtype=np.float64) for item in items])

    def scored(places: Places) -> Mapping[str, float]:
        times = np.bincount(places, minlength=len(items)).astype(np.float64)
        return score.figures((times @ columns).tolist())

    return scored


def _minus(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {name: value - theirs[name] for name, value in ours.items() if name in theirs}


def _add(found: dict[str, list[float]], figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
        if math.isfinite(value):
            found.setdefault(name, []).append(value)


def _difference(value: float, drawn: Sequence[float], level: float) -> Difference:
    below, above = (sum(sign * one >= 0 for one in drawn) for sign in (-1, 1))
    p = min(1.0, 2 * (min(below, above) + 1) / (len(drawn) + 1))
    return Difference(value, *_middle(sorted(drawn), level), p)


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
