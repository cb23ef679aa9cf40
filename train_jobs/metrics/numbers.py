"""How well numbers were predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from train_jobs.metrics.check import paired


def mean_squared_error(said: Sequence[float], meant: Sequence[float]) -> float:
    """Return the mean of squared differences, in the square of the label's unit."""
    paired(said, meant)
    return math.fsum((s - m) ** 2 for s, m in zip(said, meant, strict=True)) / len(meant)


def pearson(said: Sequence[float], meant: Sequence[float]) -> float:
    """Return the linear correlation, -1 to 1; 0 where one side never varies.

    Pearson, Proceedings of the Royal Society 58, 1895.
    """
    paired(said, meant)
    count = len(meant)
    mean_said, mean_meant = math.fsum(said) / count, math.fsum(meant) / count
    apart = [(s - mean_said, m - mean_meant) for s, m in zip(said, meant, strict=True)]
    spread = math.fsum(a * a for a, _ in apart) * math.fsum(b * b for _, b in apart)
    return math.fsum(a * b for a, b in apart) / math.sqrt(spread) if spread else 0.0


def spearman(said: Sequence[float], meant: Sequence[float]) -> float:
    """Return the correlation of ranks, -1 to 1; equal values share their mean rank.

    Spearman, American Journal of Psychology 15, 1904.
    """
    paired(said, meant)
    return pearson(_ranks(said), _ranks(meant))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for at in order[start:end]:
            ranks[at] = (start + end + 1) / 2
        start = end
    return ranks
