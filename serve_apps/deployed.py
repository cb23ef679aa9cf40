"""What replicas reported lately, and the news that somebody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from cluster.library.ref import Update
from serve_apps.adapter_policy import names_of, reports_of
from serve_apps.release_policy import LIVE_S, Report


@dataclass(slots=True)
class Model:
    """What is known about one deployed model since this process began."""

    alias: str
    reports: dict[str, Report]
    seen_s: dict[str, float]
    target: str | None = None
    progress: str = ""
    allowed: set[str] | None = None
    """Replicas that may hold the target; ``None``: all."""
    flipped: set[str] = field(default_factory=set)
    """Replicas that answer with the target before the alias has moved."""
    update: Update | None = None
    """What becomes of running requests when they flip to it, where that was asked for."""


class Deployed:
    """The deployed models. It forgets replicas that have not asked for some time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.models: dict[str, Model] = {}
        self._changed = asyncio.Event()

    def report(self, name: str, replica: str, report: Report) -> None:
        """Take what a replica of a known model has just brought about."""
        model = self.models[name]
        model.seen_s[replica] = self.clock()
        before, model.reports[replica] = model.reports.get(replica), report
        if before != report:
            self.changed()

    def leave(self, name: str, replica: str) -> None:
        """Forget a replica that shuts down."""
        if (model := self.models.get(name)) and model.reports.pop(replica, None) is not None:
            model.seen_s.pop(replica, None)
            if not model.reports and model.target is None:
                del self.models[name]  # undeployed; a crash says no goodbye
            self.changed()

    def live(self, name: str) -> dict[str, Report]:
        """Return the replicas of a model that have asked lately, and what they reported."""
        model = self.models.get(name)
        if model is None:
            return {}
        now = self.clock()
        for replica in [r for r, seen in model.seen_s.items() if now - seen > LIVE_S]:
            del model.reports[replica], model.seen_s[replica]
        return dict(model.reports)

    def model_of(self, name: str) -> str | None:
        """Return the deployed model that answers for a name: itself, or the base of an adapter."""
        if name in self.models:
            return name
        for model in self.models:
            if any(name in names_of(report) for report in self.live(model).values()):
                return model
        return None

    def live_of(self, name: str) -> dict[str, Report]:
        """Return what was reported lately of a model, or of an adapter as if it were one."""
        model = self.model_of(name)
        if model is None or model == name:
            return self.live(name)
        return reports_of(name, self.live(model))

    def changed(self) -> None:
        """Have everybody who waits look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait(self, until: float) -> bool:
        """Wait for the next change; return whether there was one before ``until``.

        Nothing is missed between a look and this call: it takes the event before it suspends.
        """
        changed, left = self._changed, until - self.clock()
        if left <= 0:
            return False
        try:
            # not wait_for: in Python 3.11 it may swallow a cancellation
            async with asyncio.timeout(left):
                await changed.wait()
        except TimeoutError:
            return False
        return True


def asleep(reports: Collection[Report]) -> bool:
    """Say whether a model is out of memory: all its replicas are."""
    return bool(reports) and all(report.asleep for report in reports)
