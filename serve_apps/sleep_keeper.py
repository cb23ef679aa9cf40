"""What the Releases actor remembers about sleep: who was told to, who is wanted, who leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve_apps.release_policy import Report
from serve_apps.sleep_policy import Sleep, Tenant, decide

WANTED_S = 10.0
"""Who waits for a model says so again before this is over."""
LOAD_S = 120.0
"""Who has one loaded says so once: others have so long to leave for it."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the actor knows of one model beside its replicas' reports."""

    reports: Mapping[str, Report]
    moving: bool
    """Whether a promotion or a release needs its replicas awake."""
    estimate: Callable[[], int]
    """What one replica takes, where none has been awake to say so."""


class SleepKeeper:
    """Lives on the actor's loop. After a restart the reports say who sleeps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.budget: int | None = None
        """Bytes that models may take on each node."""
        self._wanted: dict[str, float] = {}
        self._unload: set[str] = set()
        self._sleep = Sleep(frozenset())
        self._met: set[str] = set()
        self._estimates: dict[str, int] = {}

    def wake(self, name: str, wanted_s: float = WANTED_S) -> str:
        """Somebody waits for a model: return why it does not come yet, if that is known."""
        until = self._clock() + wanted_s
        self._wanted[name] = max(until, self._wanted.get(name, until))
        self._unload.discard(name)
        return self._sleep.waits.get(name, "")

    def unload(self, name: str) -> None:
        """Have a model leave as soon as it is idle, until somebody asks for it."""
        self._wanted.pop(name, None)
        self._unload.add(name)

    def ordered(self, name: str) -> bool:
        """Say whether a model has been told to sleep."""
        return name in self._sleep.asleep

    def look(self, models: Mapping[str, Known]) -> bool:
        """Decide anew; return whether somebody's order has changed."""
        now = self._clock()
        self._wanted = {name: until for name, until in self._wanted.items() if until > now}
        self._unload &= set(models)
        self._met &= set(models)
        tenants = [self._tenant(name, known) for name, known in sorted(models.items())]
        before, self._sleep = self._sleep.asleep, decide(tenants, self.budget)
        return before != self._sleep.asleep

    def _tenant(self, name: str, known: Known) -> Tenant:
        reports = [*known.reports.values()]
        asleep = bool(reports) and all(report.asleep for report in reports)
        if name not in self._met:  # this actor's own restart, or a model that is deployed now
            self._met.add(name)
            if asleep:
                self._sleep = Sleep(self._sleep.asleep | {name}, self._sleep.waits)
        needs: dict[str, int] = {}
        for report in reports:
            needs[report.node] = needs.get(report.node, 0) + self._need(name, report, known)
        return Tenant(
            name,
            asleep,
            name in self._sleep.asleep,
            min((report.idle_s for report in reports), default=0.0),
            next((r.idle_limit_s for r in reports if r.idle_limit_s is not None), None),
            needs,
            name in self._wanted or known.moving,
            name in self._unload,
            not any(report.active for report in reports),
        )

    def _need(self, name: str, report: Report, known: Known) -> int:
        if report.need_bytes is not None:
            return report.need_bytes
        if name not in self._estimates:
            self._estimates[name] = known.estimate()
        return self._estimates[name]
