"""How a process counts: the protocol, Ray's pipeline behind it, and nothing at all behind it.

Instruments are built where they are used, inside an actor or a worker: Ray adds the process to
their labels there. Counting never raises for what happens at run time and never waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from cluster.metrics import PREFIX, Metric


class Meter(Protocol):
    """Takes numbers. ``labels`` are exactly those that the metric names."""

    def add(self, metric: Metric, value: float, **labels: str) -> None:
        """Raise a counter by ``value``, which is more than 0."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Put one sample into a histogram."""


class NullMeter:
    """Counts nothing."""

    def add(self, metric: Metric, value: float, **labels: str) -> None:
        """Do nothing."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Do nothing."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Do nothing."""


class RayMeter:
    """Ray's own pipeline: seen in Prometheus after at most ``EXPORT_S`` and a scrape."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        """Build the instruments; to be called inside a Ray process."""
        self._held: dict[str, Any] = {metric.name: _instrument(metric) for metric in metrics}

    def add(self, metric: Metric, value: float, **labels: str) -> None:
        """See :meth:`Meter.add`."""
        self._held[metric.name].inc(value, labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """See :meth:`Meter.set`."""
        self._held[metric.name].set(value, labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """See :meth:`Meter.observe`."""
        self._held[metric.name].observe(value, labels)


class Tally:
    """Counters gathered in a dictionary and passed on now and then: an addition a token."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._held: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}

    def add(self, metric: Metric, value: float, **labels: str) -> None:
        """Remember that a counter rose."""
        key = metric, tuple(labels.items())
        self._held[key] = self._held.get(key, 0.0) + value

    def flush(self) -> None:
        """Pass on what came together since the last time."""
        held, self._held = self._held, {}
        for (metric, labels), value in held.items():
            if value > 0:
                self._meter.add(metric, value, **dict(labels))


def _instrument(metric: Metric) -> Any:
    # not ray.serve.metrics: its label of a replica's random id is one that WorkerId stands for
    from ray.util.metrics import Counter, Gauge, Histogram

    name, told, keys = f"{PREFIX}{metric.name}", metric.help, metric.labels
    if metric.kind == "counter":
        return Counter(name, told, keys)
    if metric.kind == "gauge":
        return Gauge(name, told, keys)
    return Histogram(name, told, list(metric.buckets), keys)
