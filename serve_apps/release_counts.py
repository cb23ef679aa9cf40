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
    tokens: int = 0
    """After the first of their answer."""
    token_s: float = 0.0
    """Seconds that these took."""
    first: Counter[int] = field(default_factory=Counter)
    """Times to the first token, by class."""
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
        at = math.ceil(math.log(max(seconds, FIRST_S) / FIRST_S, GROWTH))
        self.first[min(at, CLASSES)] += 1

    def add(self, more: Counts) -> None:
        """Take what somebody else has counted."""
        self.requests += more.requests
        self.errors += more.errors
        self.missed += more.missed
        self.tokens += more.tokens
        self.token_s += more.token_s
        self.first.update(more.first)
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
        """Return the 95th percentile, or where it lies with that many standard deviations.

        The rank of a quantile is binomial, whatever the times are distributed like.
        """
        total, below = self.first.total(), 0
        rank = 0.95 * total + deviations * math.sqrt(total * 0.95 * 0.05)
        wanted = min(max(math.ceil(rank), 1), total)
        for at in sorted(self.first):
            below += self.first[at]
            if below >= wanted:
                return FIRST_S * GROWTH**at
        return None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of one answer, after its first; ``None`` where there were none."""
        return self.tokens / self.token_s if self.token_s else None

    def as_json(self) -> dict[str, Any]:
        """Return what a record keeps; `from_json` makes counts of it again."""
        told: dict[str, Any] = {
            "requests": self.requests,
            "errors": self.errors,
            "ttft_p95_s": None if self.ttft_p95 is None else round(self.ttft_p95, 4),
            "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 2),
            "tokens": self.tokens,
            "token_s": round(self.token_s, 4),
            "first": {str(at): count for at, count in sorted(self.first.items())},
        }
        for name in ("missed", *SHADOW):
            if value := getattr(self, name):
                told[name] = round(value, 4)
        return told


def from_json(told: Mapping[str, Any]) -> Counts:
    """Return the counts that a record keeps."""
    numbers = ("requests", "errors", "missed", "tokens", "token_s")
    made = Counts(**{name: told.get(name, 0) for name in (*numbers, *SHADOW)})
    made.first.update({int(at): count for at, count in told.get("first", {}).items()})
    return made
