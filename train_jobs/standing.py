"""What held-out figures during a run say: which steps were best, whether to go on. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import JobError
from train_jobs.supervision import Best, EarlyStop


@dataclass(frozen=True)
class Standing:
    """Where a run stands after its last evaluation; a checkpoint carries it."""

    best: tuple[tuple[int, float], ...] = ()
    """(step, figure) of the best evaluations, the best first."""
    record: float | None = None
    """The best figure for ``early_stop`` so far."""
    stale: int = 0
    """Evaluations since then."""
    ended: bool = False
    """Whether they were too many."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Standing:
        """Read back what `dataclasses.asdict` and JSON made of one."""
        best = tuple((int(step), float(figure)) for step, figure in fields.get("best", ()))
        return cls(**{**fields, "best": best})

    @property
    def steps(self) -> frozenset[int]:
        """Steps whose checkpoints stay."""
        return frozenset(step for step, _ in self.best)

    def after(
        self,
        step: int,
        figures: Mapping[str, float],
        best: Best | None,
        early_stop: EarlyStop | None,
    ) -> Standing:
        """Return where it stands with the evaluation after ``step``."""
        told = self
        if best:
            figure = named(figures, best.metric, "run.best.metric")
            sign = 1 if best.mode == "min" else -1
            others = [(s, f) for s, f in self.best if s != step]
            # of equal ones the older is the better
            ranked = sorted([*others, (step, figure)], key=lambda one: (sign * one[1], one[0]))
            told = replace(told, best=tuple(ranked[: best.keep]))
        if early_stop:
            told = told._judged(figures, early_stop)
        return told

    def _judged(self, figures: Mapping[str, float], rule: EarlyStop) -> Standing:
        figure = named(figures, rule.metric, "run.early_stop.metric")
        sign = 1 if rule.mode == "min" else -1
        if self.record is None or sign * (self.record - figure) > rule.min_delta:
            return replace(self, record=figure, stale=0)
        stale = self.stale + 1
        return replace(self, stale=stale, ended=stale >= rule.patience)


def named(figures: Mapping[str, float], metric: str, field: str) -> float:
    """Return a figure by its name.

    Raises:
        JobError: the objective gives no such figure, or it is no number.
    """
    found = figures.get(metric)
    if found is None:
        raise JobError(
            f"{field}={metric!r:.60}: the held-out rows of this objective give "
            f"{', '.join(sorted(figures))}"
        )
    if not math.isfinite(found):
        raise JobError(f"{field}={metric!r}: it is {found}, which is neither better nor worse")
    return found
