"""What is counted of a version while a release runs. Pure; small, whatever the traffic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FIRST_S = 0.0005
GROWTH = 1.05
"""Bounds of the classes of times: each 5 % above the one before, so a percentile is that exact."""
CLASSES = 300
"""The last begins after 1,000 seconds."""
SHADOW = ("shadows", "shadow_errors", "shadow_s", "shadowed_s", "compared", "matched")


@dataclass(slots=True)
class Counts:
    """Of one version, since some moment."""

    requests: int = 0
    """Answers that ended, well or by an error that was not the client's."""
    errors: int = 0
    missed: int = 0
    """Requests that another version answered, because this one was not live where they came."""
    first: Counter[int] = field(default_factory=Counter)
    """Times to the first token, by class."""
    per_token: Counter[int] = field(default_factory=Counter)
    """Times of one token of an answer after its first: a mean of each answer, by class."""
    shadows: int = 0
    """Answers in the shadow,"""
    shadow_errors: int = 0
    shadow_s: float = 0.0
    """Seconds that they took, first token to last,"""
    shadowed_s: float = 0.0
    """and that the champion took for the same requests."""
    compared: int = 0
    """those among them that had to be the champion's,"""
    matched: int = 0
    """and those that were."""

    def first_token(self, seconds: float) -> None:
        """Count one time to the first token."""
        self.first[_class(seconds)] += 1

    def answered(self, tokens: int, seconds: float) -> None:
        """Count one answer: its tokens after what came first, and the time that they took."""
        if tokens:
            self.per_token[_class(seconds / tokens)] += 1

    def add(self, more: Counts) -> None:
        """Take what somebody else has counted."""
        self.requests += more.requests
        self.errors += more.errors
        self.missed += more.missed
        self.first.update(more.first)
        self.per_token.update(more.per_token)
        self.shadows += more.shadows
        self.shadow_errors += more.shadow_errors
        self.shadow_s += more.shadow_s
        self.shadowed_s += more.shadowed_s
        self.compared += more.compared
        self.matched += more.matched

    @property
    def error_rate(self) -> float:
        """Share of the requests that failed; 0 of none."""
        return self.errors / self.requests if self.requests else 0.0

    @property
    def ttft_p95(self) -> float | None:
        """Seconds that 95 % of the requests did not wait longer than; ``None`` of none."""
        return self.waited(0.0)

    def waited(self, deviations: float) -> float | None:
        """Return the 95th percentile, or where it lies with that many standard deviations."""
        return _quantile(self.first, 0.95, deviations)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of the median answer, after its first; ``None`` where there were none."""
        return self.pace(0.0)

    def pace(self, deviations: float) -> float | None:
        """Return that rate, or what it is at least with that many standard deviations."""
        took = _quantile(self.per_token, 0.5, deviations)
        return 1.0 / took if took else None

    def as_json(self) -> dict[str, Any]:
        """Return what a record keeps; `from_json` makes counts of it again."""
        told: dict[str, Any] = {
            "requests": self.requests,
            "errors": self.errors,
            "ttft_p95_s": None if self.ttft_p95 is None else round(self.ttft_p95, 4),
            "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 2),
            "first": _rows(self.first),
            "per_token": _rows(self.per_token),
        }
        for name in ("missed", *SHADOW):
            if value := getattr(self, name):
                told[name] = round(value, 4)
        return told


def from_json(told: Mapping[str, Any]) -> Counts:
    """Return the counts that a record keeps."""
    numbers = ("requests", "errors", "missed")
    made = Counts(**{name: told.get(name, 0) for name in (*numbers, *SHADOW)})
    for name in ("first", "per_token"):
        getattr(made, name).update({int(at): n for at, n in told.get(name, {}).items()})
    return made


def _class(seconds: float) -> int:
    at = math.ceil(math.log(max(seconds, FIRST_S) / FIRST_S, GROWTH))
    return min(at, CLASSES)


def _rows(times: Mapping[int, int]) -> dict[str, int]:
    return {str(at): count for at, count in sorted(times.items())}


def _quantile(times: Counter[int], share: float, deviations: float) -> float | None:
    """Return where a quantile of times lies, with so many standard deviations.

    The rank of a quantile is binomial, whatever the times are distributed like.
    """
    total, below = times.total(), 0
    rank = share * total + deviations * math.sqrt(total * share * (1 - share))
    wanted = min(max(math.ceil(rank), 1), total)
    for at in sorted(times):
        below += times[at]
        if below >= wanted:
            return FIRST_S * GROWTH**at
    return None
