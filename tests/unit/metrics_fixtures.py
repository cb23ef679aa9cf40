"""A meter that remembers, and refuses what Ray would refuse."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from cluster.metrics import Metric

Key = tuple[str, tuple[tuple[str, str], ...]]


class MemoryMeter:
    """Numbers by name and labels."""

    def __init__(self) -> None:
        self.counters: dict[Key, float] = defaultdict(float)
        self.gauges: dict[Key, float] = {}
        self.samples: dict[Key, list[float]] = defaultdict(list)

    def add(self, metric: Metric, value: float, **labels: str) -> None:
        assert value > 0, "Ray's counters only rise"
        self.counters[self._key(metric, "counter", labels)] += value

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self.gauges[self._key(metric, "gauge", labels)] = value

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        self.samples[self._key(metric, "histogram", labels)].append(value)

    def get(self, metric: Metric, **labels: str) -> Any:
        """Return the number of all series whose labels include these: counters summed."""
        held: Any = {
            "counter": self.counters,
            "gauge": self.gauges,
            "histogram": self.samples,
        }[metric.kind]
        found = [
            value
            for (name, pairs), value in held.items()
            if name == metric.name and labels.items() <= dict(pairs).items()
        ]
        if metric.kind == "histogram":
            return [sample for samples in found for sample in samples]
        return sum(found) if metric.kind == "counter" else found

    @property
    def series(self) -> set[Key]:
        """Return every series, as Prometheus would count names and labels."""
        return {*self.counters, *self.gauges, *self.samples}

    def _key(self, metric: Metric, kind: str, labels: dict[str, str]) -> Key:
        assert metric.kind == kind, f"{metric.name} is a {metric.kind}"
        assert set(labels) == set(metric.labels), f"{metric.name}: {sorted(labels)}"
        assert all(type(value) is str for value in labels.values()), labels
        return metric.name, tuple(sorted(labels.items()))
