"""What rank 0 of a run shows in Prometheus while it trains: the records of ``metrics.jsonl``.

Ray forgets a gauge that nobody has set for two export intervals, and a step may take longer: so a
thread says the last values again, for as long as the process lives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from cluster import metrics
from cluster.library.ref import Ref
from cluster.meter import Meter, RayMeter
from train_jobs.runs import RunDir

ENGINE = "deepspeed"
AGAIN_S = 5.0
OF_THE_LOOP = frozenset({*metrics.TRAIN_GAUGES, *metrics.TRAIN_COUNTERS, "time"})
"""What a step's record holds beside the objective's own figures."""


class Telemetry:
    """Turns each record of a run into gauges and counters; costs nothing but at a step's end."""

    def __init__(self, meter: Meter, model: str, now: Callable[[], float] = time.time) -> None:
        """``model`` is the reference of the base that the run trains."""
        ref = Ref.parse(model)
        version = metrics.NONE if ref.version is None else str(ref.version)
        self._meter, self._now = meter, now
        self._gauges: dict[tuple[metrics.Metric, str], float] = {}
        """By the metric, and which figure it is of where it has several."""
        self._labels = {"model_name": ref.name, "model_version": version, "engine": ENGINE}

    def report(self, record: Mapping[str, Any]) -> None:
        """Show one record: a step, or an event. Unknown keys are left alone."""
        event = record.get("event")
        if event == "checkpoint":
            self._set(metrics.TRAIN_CHECKPOINT_TIME, self._now())
        elif event == "evaluated":
            self._set(metrics.TRAIN_HELDOUT_LOSS, record.get("loss"))
            self._figures(metrics.TRAIN_HELDOUT_FIGURE, record, {"loss", "time"})
        elif event is None and "step" in record:
            self._step(record)

    def again(self) -> None:
        """Say the last value of every gauge once more."""
        for (gauge, figure), value in list(self._gauges.items()):
            self._say(gauge, value, figure)

    def _step(self, record: Mapping[str, Any]) -> None:
        for key, gauge in metrics.TRAIN_GAUGES.items():
            self._set(gauge, record.get(key))
        for key, counter in metrics.TRAIN_COUNTERS.items():
            if (value := record.get(key) or 0) > 0:
                self._meter.add(counter, float(value), **self._labels)
        self._meter.add(metrics.TRAIN_STEPS, 1, **self._labels)
        self._figures(metrics.TRAIN_FIGURE, record, OF_THE_LOOP)

    def _figures(
        self, gauge: metrics.Metric, record: Mapping[str, Any], known: Collection[str]
    ) -> None:
        """Show what an objective says beside the loss; its names are those in its code."""
        for name, value in record.items():
            if name not in known and isinstance(value, float):
                self._set(gauge, value, name)

    def _set(self, gauge: metrics.Metric, value: Any, figure: str = "") -> None:
        if value is not None:
            self._gauges[gauge, figure] = float(value)
            self._say(gauge, float(value), figure)

    def _say(self, gauge: metrics.Metric, value: float, figure: str) -> None:
        which = {"figure": figure} if figure else {}
        self._meter.set(gauge, value, **self._labels, **which)


@cache
def telemetry(run: RunDir) -> Telemetry:
    """Return the telemetry of a run in this process of Ray's, made at the first call."""
    from cluster.config import load
    from train_jobs.config import FinetuneConfig

    shown = Telemetry(RayMeter(metrics.TRAINING), load(run.config, FinetuneConfig).model)
    threading.Thread(target=_repeat, args=(shown,), name="telemetry", daemon=True).start()
    return shown


def _repeat(shown: Telemetry) -> None:
    while True:
        time.sleep(AGAIN_S)
        shown.again()
