"""What a panel is, and the queries that panels are made of. Pure.

Queries sum over ``WorkerId``, because a restarted process leaves its old counters behind. One
that has an answer only when something fails ends in ``or vector(0)``: an empty panel always means
that something is missing, never that all is well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.metrics import Metric, Timing

MODELS = 'model_name=~"$model"'
RATE = "[$__rate_interval]"
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Query:
    """One curve, or one for each value of the labels in ``legend``."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. ``unit`` is Grafana's name for it."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Literal["timeseries", "stat"] = "timeseries"
    told: str = ""
    width: int = 8
    """Of 24."""


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and the panels under it."""

    title: str
    panels: tuple[Panel, ...]


def rate(metric: Metric, by: str = "", where: str = MODELS) -> str:
    """Return the rate of a counter, summed over everything but ``by``."""
    head = f"sum by ({by}) " if by else "sum"
    return f"{head}(rate({metric.series}{{{where}}}{RATE}))"


def or_zero(expr: str) -> str:
    """Return a query that answers 0 where there is nothing to count."""
    return f"{expr} or vector(0)"


def gauge(metric: Metric, by: str = "model_name", how: str = "sum") -> str:
    """Return a gauge over all processes."""
    return f"{how} by ({by}) ({metric.series}{{{MODELS}}})"


def spread(timing: Timing, where: str = MODELS) -> tuple[Query, ...]:
    """Return quantiles of a histogram, and the true mean from the counters beside it."""
    buckets = f"sum by (le) (rate({timing.spread.series}_bucket{{{where}}}{RATE}))"
    mean = f"{rate(timing.seconds, where=where)} / {rate(timing.count, where=where)}"
    quantiles = [Query(f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}") for q in QUANTILES]
    return (*quantiles, Query(mean, "mean"))


def curve(title: str, expr: str, legend: str, unit: str = "short", told: str = "") -> Panel:
    """Return a panel of one query."""
    return Panel(title, (Query(expr, legend),), unit, told=told)


def number(title: str, expr: str, unit: str = "short", told: str = "") -> Panel:
    """Return a panel that shows one number."""
    return Panel(title, (Query(expr, title.lower()),), unit, "stat", told, 4)
