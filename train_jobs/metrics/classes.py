"""How well classes were told apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from typing import Literal, TypeVar

from train_jobs.metrics.check import paired

Class = TypeVar("Class", bound=Hashable)
Average = Literal["micro", "macro"]


def accuracy(said: Sequence[object], meant: Sequence[object]) -> float:
    """Return the share of predictions that are right, 0 to 1."""
    paired(said, meant)
    return sum(s == m for s, m in zip(said, meant, strict=True)) / len(meant)


def f1(said: Sequence[Hashable], meant: Sequence[Hashable], average: Average) -> float:
    """Return the F1 of one class each, 0 to 1; see `f1_of_sets`.

    ``micro`` equals the accuracy here; ``macro`` weighs a rare class like a common one.
    """
    return f1_of_sets([{one} for one in said], [{one} for one in meant], average)


def f1_of_sets(
    said: Sequence[Collection[Class]], meant: Sequence[Collection[Class]], average: Average
) -> float:
    """Return the harmonic mean of precision and recall over several classes each, 0 to 1.

    ``macro`` is the mean over the classes that were said or meant anywhere; a class that was never
    both counts 0 (van Rijsbergen, Information Retrieval, 2nd ed., 1979, chapter 7; the mean of F1s
    as in arXiv:1911.03347).
    """
    paired(said, meant)
    hits, told, due = Counter[Class](), Counter[Class](), Counter[Class]()
    for ours, theirs in zip(said, meant, strict=True):
        told.update(set(ours))
        due.update(set(theirs))
        hits.update(set(ours) & set(theirs))
    if average == "micro":
        return harmonic(hits.total(), told.total(), due.total())
    classes = told.keys() | due.keys()
    each = [harmonic(hits[name], told[name], due[name]) for name in classes]
    return math.fsum(each) / len(each) if each else 0.0


def harmonic(hits: float, said: float, meant: float) -> float:
    """Return F1 from counts: ``2 hits / (said + meant)``, 0 where there is nothing."""
    return 2 * hits / (said + meant) if said + meant else 0.0


def matthews(said: Sequence[Hashable], meant: Sequence[Hashable]) -> float:
    """Return the correlation of two labellings, -1 to 1; 0 where one of them never varies.

    Matthews' coefficient (Biochimica et Biophysica Acta 405, 1975) for any number of classes
    (Gorodkin, Computational Biology and Chemistry 28, 2004).
    """
    paired(said, meant)
    total, right = len(meant), sum(s == m for s, m in zip(said, meant, strict=True))
    told, due = Counter(said), Counter(meant)
    both = sum(told[name] * due[name] for name in told)
    spread_said = total**2 - sum(count**2 for count in told.values())
    spread_meant = total**2 - sum(count**2 for count in due.values())
    if not spread_said or not spread_meant:
        return 0.0
    return (right * total - both) / math.sqrt(spread_said * spread_meant)


def expected_calibration_error(
    confidences: Sequence[float], right: Sequence[bool], bins: int = 15
) -> float:
    """Return how far confidence and accuracy lie apart, 0 to 1, weighed over bins of confidence.

    Bins of equal width, each open at its lower end (Guo et al., arXiv:1706.04599).
    """
    paired(confidences, right)
    number, hits = Counter[int](), Counter[int]()
    weights: dict[int, float] = {}
    for confidence, hit in zip(confidences, right, strict=True):
        at = max(0, math.ceil(confidence * bins) - 1)
        number[at] += 1
        hits[at] += hit
        weights[at] = weights.get(at, 0.0) + confidence
    return math.fsum(abs(weights[at] - hits[at]) for at in number) / len(right)
