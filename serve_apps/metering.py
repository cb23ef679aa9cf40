"""What a replica counts: from its own stream of events, and from the engine's gauges."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster import metrics
from cluster.errors import RequestError, RoundhouseError
from cluster.meter import Meter, Tally
from cluster.metrics import version_label
from serve_apps.calls import Event
from serve_apps.engine.interface import EngineStats

PERIOD_S = 2.0
"""Between two looks at the engine's gauges; counters are passed on as often."""
BUSY = frozenset({429, 503})

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rest:
    """How a replica and its memory are; ``wakes`` and ``waking_s`` since it began."""

    asleep: bool
    memory_bytes: int
    wakes: int
    waking_s: float


class ReplicaMeter:
    """The numbers of one replica. A token costs an addition; a chunk one histogram sample."""

    def __init__(
        self,
        meter: Meter,
        model_name: str,
        engine: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``engine`` is the kind of engine, as the configuration names it."""
        self.meter, self.clock = meter, clock
        self.tally = Tally(meter)
        self._model, self._engine = model_name, engine
        self._active: str | None = None
        self._shown: set[str] = set()
        self._calls: set[CallMeter] = set()
        self._rest = Rest(False, 0, 0, 0.0)

    def labels(self, version: str | None) -> dict[str, str]:
        """Return the labels of a version, by default the one that answers."""
        return {
            "model_name": self._model,
            "model_version": version_label(version or self._active),
            "engine": self._engine,
        }

    @contextmanager
    def call(self, answers: int) -> Iterator[CallMeter]:
        """Follow one call of so many answers; whatever ends it is counted."""
        watch = CallMeter(self, answers)
        self._calls.add(watch)
        otherwise = "error"
        try:
            yield watch
        except (GeneratorExit, asyncio.CancelledError):
            otherwise = "cancelled"
            raise
        finally:
            self._calls.discard(watch)
            watch.end(otherwise)

    def look(self, stats: EngineStats) -> None:
        """Show the gauges of this moment, and pass the counters on."""
        self._active = stats.active
        if stats.active is None:  # it starts, or has just ended: there is no version to speak of
            self.flush()
            return
        labels = self.labels(stats.active)
        used, total = stats.cache_tokens_used, stats.cache_tokens_total
        for version in self._shown - {labels["model_version"]}:
            self._show(0, 0, 0.0, 0, {**labels, "model_version": version})
        self._show(stats.running, stats.waiting, used / total if total else 0.0, 1, labels)
        self._shown.add(labels["model_version"])
        self.flush()

    def rests(self, rest: Rest) -> None:
        """Show whether the model is in memory, and count how often it has come back."""
        before, self._rest, name = self._rest, rest, self._model
        self.meter.set(metrics.MODEL_ASLEEP, float(rest.asleep), model_name=name)
        self.meter.set(metrics.MODEL_MEMORY, rest.memory_bytes, model_name=name)
        self.tally.add(metrics.WAKEUPS, rest.wakes - before.wakes, model_name=name)
        self.tally.add(metrics.WAKEUP_SECONDS, rest.waking_s - before.waking_s, model_name=name)
        if rest.asleep:  # there is no engine to say so
            for version in self._shown:
                self._show(0, 0, 0.0, 0, self.labels(None) | {"model_version": version})

    def flush(self) -> None:
        """Pass on what every call has counted so far."""
        for watch in self._calls:
            watch.drain()
        self.tally.flush()

    async def run(
        self, stats: Callable[[], Awaitable[EngineStats]], rest: Callable[[], Rest]
    ) -> None:
        """Look every ``PERIOD_S``, until cancelled. An engine that does not answer is no news."""
        while True:
            self.rests(rest())
            try:
                self.look(await stats())
            except RoundhouseError as error:  # the health check tells it, and acts
                log.debug("no gauges: %s", error)
                self.flush()
            await asyncio.sleep(PERIOD_S)

    def _show(
        self, running: int, waiting: int, usage: float, active: int, labels: dict[str, str]
    ) -> None:
        self.meter.set(metrics.RUNNING, running, **labels)
        self.meter.set(metrics.WAITING, waiting, **labels)
        self.meter.set(metrics.CACHE_USAGE, usage, **labels)
        self.meter.set(metrics.VERSION_ACTIVE, active, **labels)


class CallMeter:
    """One call: times its answers, counts how each of them ended."""

    def __init__(self, owner: ReplicaMeter, answers: int) -> None:
        self._owner, self._open = owner, answers
        self._began = owner.clock()
        self._last: dict[int, tuple[float, int]] = {}
        self._labels: dict[str, str] | None = None
        self._reason: str | None = None
        self._tokens, self._between, self._between_s = 0, 0, 0.0

    def saw(self, event: Event) -> None:
        """Count an event on its way out."""
        now = self._owner.clock()
        if self._labels is None:  # the version is the same on every event of a call
            self._labels = self._owner.labels(event.version)
        last = self._last.get(event.number)
        if last is None:
            self._first(event, now, self._labels)
        elif fresh := event.completion_tokens - last[1]:
            spent = now - last[0]
            self._owner.meter.observe(metrics.INTER_TOKEN.spread, spent / fresh, **self._labels)
            self._tokens += fresh
            self._between += fresh
            self._between_s += spent
            self._last[event.number] = now, event.completion_tokens
        if event.finish:
            self._finished(event.finish, now, self._labels)

    def drain(self) -> None:
        """Hand on the tokens counted since the last time."""
        if self._labels and self._tokens:
            add, labels = self._owner.tally.add, self._labels
            add(metrics.GENERATION_TOKENS, self._tokens, **labels)
            add(metrics.INTER_TOKEN.count, self._between, **labels)
            add(metrics.INTER_TOKEN.seconds, self._between_s, **labels)
            self._tokens, self._between, self._between_s = 0, 0, 0.0

    def failed(self, error: RoundhouseError) -> None:
        """Say what the call's open answers end with."""
        if not isinstance(error, RequestError):
            self._reason = "engine"
        else:
            self._reason = "busy" if error.status in BUSY else "refused"

    def end(self, otherwise: str) -> None:
        """Count the answers that have not ended, by the reason told before, or this one."""
        self.drain()
        if self._open > 0:
            labels = self._labels or self._owner.labels(None)
            reason = self._reason or otherwise
            self._owner.tally.add(metrics.REQUEST_FAILURE, self._open, **labels, reason=reason)

    def _first(self, event: Event, now: float, labels: dict[str, str]) -> None:
        waited, add = now - self._began, self._owner.tally.add
        self._owner.meter.observe(metrics.TIME_TO_FIRST_TOKEN.spread, waited, **labels)
        add(metrics.TIME_TO_FIRST_TOKEN.seconds, waited, **labels)
        add(metrics.TIME_TO_FIRST_TOKEN.count, 1, **labels)
        add(metrics.PROMPT_TOKENS, event.prompt_tokens, **labels)
        add(metrics.CACHED_TOKENS, event.cached_tokens, **labels)
        if event.queued_s is not None:
            self._owner.meter.observe(metrics.QUEUE.spread, event.queued_s, **labels)
            add(metrics.QUEUE.seconds, event.queued_s, **labels)
        self._tokens += event.completion_tokens
        self._last[event.number] = now, event.completion_tokens

    def _finished(self, finish: str, now: float, labels: dict[str, str]) -> None:
        self._open -= 1
        whole, add = now - self._began, self._owner.tally.add
        self._owner.meter.observe(metrics.E2E.spread, whole, **labels)
        add(metrics.E2E.seconds, whole, **labels)
        add(metrics.REQUEST_SUCCESS, 1, **labels, finished_reason=finish)
