"""What evaluation keeps of one example. Pure: it travels between ranks, and is scored anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """One example as a model sees it."""

    where: str
    """``file:line``; pairs the outcomes of two models."""
    loss: float
    """Summed over ``weight`` terms, in nats where it is a likelihood."""
    weight: float
    """Trained tokens of a text, 1 for what is judged as a whole."""
    said: Any = None
    """The prediction."""
    meant: Any = None
    """What it should have been."""


def mean_loss(outcomes: Iterable[Outcome]) -> float:
    """Return the mean over terms, not over examples; nan where there are none."""
    total = weight = 0.0
    for outcome in outcomes:
        total += outcome.loss
        weight += outcome.weight
    return total / weight if weight else float("nan")
