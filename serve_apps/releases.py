"""The Releases actor: which version answers, and promotions in two phases.

The library's aliases are the record; everything else here is what replicas reported lately, so
after a crash the next polls rebuild it. First all live replicas load the target beside what they
have; only then the alias moves, by compare-and-swap; then they activate it, let the requests of
the old version finish, and release it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol

from cluster.errors import Conflict, LibraryError, ReleaseError, RoundhouseError
from cluster.library.ref import CHAMPION, NEWEST, Ref
from cluster.library.releases import Release
from cluster.library.store import Library, Version
from serve_apps.adapter_policy import adapters_of, after_reading
from serve_apps.release_config import Pace, ReleasePolicy
from serve_apps.release_control import Conductor
from serve_apps.release_counts import Counts
from serve_apps.release_policy import (
    LIVE_S,
    WATCH_S,
    Decision,
    GiveUp,
    Go,
    Order,
    Report,
    Served,
    Snapshot,
    Wait,
    after_load,
    after_swap,
)
from serve_apps.release_witness import Asker
from serve_apps.rollout import bytes_of, granted, turns
from serve_apps.sleep_keeper import LOAD_S, WANTED_S, Known, SleepKeeper

MOVE_S = 180.0
"""Bound of the promotion at the end of a release."""
CANDIDATE = "candidate"
"""The alias of what a release tries; it also keeps the version from being removed."""
AWAY_S = 1.0
"""Pause before the shelf is asked again after it did not answer."""

log = logging.getLogger(__name__)


class Shelf(Protocol):
    """Where running jobs put versions."""

    async def watch(self, have: Mapping[str, str]) -> dict[str, str]:
        """Return the newest of each name, once that differs or a bounded time has passed."""


@dataclass(slots=True)
class _Model:
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


class Releases:
    """Plain class; one detached actor of it exists on a cluster (:mod:`serve_apps.releases_actor`).

    All methods run on one event loop and return soon, except ``watch`` and ``snapshot`` (at most
    ``WATCH_S``) and ``promote`` (its own bound).
    """

    def __init__(
        self,
        library: Library | None = None,
        revision: str = "",
        clock: Callable[[], float] = time.monotonic,
        shelf: Shelf | None = None,
        asker: Asker | None = None,
    ) -> None:
        """``shelf`` tells of versions that running jobs have put there.

        ``asker`` answers golden prompts.
        """
        self._library, self._shelf = library or Library(), shelf
        self._newest: dict[str, str] = {}
        self._following: asyncio.Task[None] | None = None
        self._revision = revision
        self._clock, self._born_s = clock, clock()
        self._models: dict[str, _Model] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._changed = asyncio.Event()
        self._conductor = Conductor(self._library, self, asker, clock)
        self._sleep = SleepKeeper(clock)

    async def revision(self) -> str:
        """Return the hash of the code that this actor runs."""
        return self._revision

    async def watch(
        self, name: str, alias: str, replica: str, report: Report, have: Order | None
    ) -> Order:
        """Take a replica's report; return its order once that differs from ``have``.

        After ``WATCH_S`` the same order is returned again: to ask is to live.
        """
        if self._shelf and alias == NEWEST and self._following is None:
            self._following = asyncio.create_task(self._follow(self._shelf))
        await self.report(name, alias, replica, report)
        until = self._clock() + WATCH_S
        while (order := self._whole_order(name, alias, replica)) == have:
            # one that left meanwhile must not be brought back by its last question
            if not await self.wait(until) or name not in self._models:
                break
        return order

    async def report(self, name: str, alias: str, replica: str, report: Report) -> None:
        """Take what a replica has just brought about."""
        model = self._model(name, alias)
        model.seen_s[replica] = self._clock()
        before, model.reports[replica] = model.reports.get(replica), report
        if before != report:
            self.changed()

    async def leave(self, name: str, replica: str) -> None:
        """Forget a replica that shuts down."""
        self._conductor.left(name, replica)
        if (model := self._models.get(name)) and model.reports.pop(replica, None) is not None:
            model.seen_s.pop(replica, None)
            if not model.reports and model.target is None:
                del self._models[name]  # undeployed; a crash says no goodbye
            self.changed()

    async def snapshot(self, have: Snapshot | None = None) -> Snapshot:
        """Return what gateways need about every model, once it differs from ``have``."""
        until = self._clock() + WATCH_S
        while (now := self._snapshot()) == have:
            if not await self.wait(until):
                break
        return now

    async def keep_within(self, budget: int | None) -> None:
        """Take note of the bytes that models may take of each node's memory."""
        if budget != self._sleep.budget:
            self._sleep.budget = budget
            self.changed()

    async def wake(self, name: str) -> str:
        """Somebody waits for a model; return why it does not come yet, if that is known.

        Raises ReleaseError for what is not deployed.
        """
        return self._wake(name, WANTED_S)

    async def load(self, name: str) -> str:
        """Have a model come into memory that nobody may be waiting for; else as ``wake``."""
        return self._wake(name, LOAD_S)

    def _wake(self, name: str, wanted_s: float) -> str:
        self._check_deployed(name)
        why = self._sleep.wake(name, wanted_s)
        self._look_at_sleep()
        return why

    async def unload(self, name: str) -> None:
        """Have a model leave memory as soon as it is idle; ReleaseError: it is not deployed."""
        self._check_deployed(name)
        self._sleep.unload(name)
        self._look_at_sleep()

    async def sleeping(self) -> dict[str, bool]:
        """Say of each deployed model whether it is out of memory."""
        return {name: _asleep(self.live(name).values()) for name in self._models}

    async def names(self) -> list[str]:
        """Return the models that are deployed, those whose replicas are being rebuilt included."""
        return sorted({*self._models, *self._served()})

    async def progress(self, name: str) -> str:
        """Return one line on the promotion that runs for ``name``; empty when none does."""
        model = self._models.get(name)
        return model.progress if model else ""

    async def start_release(
        self, name: str, number: int, policy: ReleasePolicy, by: str
    ) -> Release:
        """Begin to put ``name@number`` in the champion's place, step by step.

        Raises ReleaseError where that cannot be, Conflict while another release runs.
        """
        candidate = self._library.get(name, number)
        model = self._models.get(name)
        if model is None:
            kind = "an adapter: promote it" if name in self._served() else "not deployed"
            raise ReleaseError(f"{name} is {kind}; a release needs replicas that answer for it")
        champion = self._library.aliases(name).get(model.alias)
        if champion is None:
            raise ReleaseError(
                f"{name}@{model.alias} points to nothing; `roundhouse promote {name}@N` first"
            )
        if champion == number:
            raise ReleaseError(f"{candidate.ref} is {name}@{model.alias} already")
        if model.alias == CANDIDATE:
            raise ReleaseError(f"{name} is deployed as @{CANDIDATE}, which a release moves itself")
        async with self._lock(name):
            self._conductor.check(name, policy)
            self._swap(name, CANDIDATE, number, self._library.aliases(name).get(CANDIDATE), by)
            release = self._conductor.start(name, model.alias, champion, number, policy, by)
        self.changed()
        return release

    async def stop_release(self, name: str, by: str) -> Release:
        """Roll a release back at once; ReleaseError where none runs."""
        return self._conductor.stop(name, by)

    async def approve_release(self, name: str, by: str) -> Release:
        """Let a release pass whose figures are missing or unclear; ReleaseError where none runs."""
        return self._conductor.approve(name, by)

    async def release_waits_for(self, name: str) -> str:
        """Say what the release of a model waits for; empty where none runs."""
        return self._conductor.waits_for(name)

    async def count(self, counts: Mapping[str, Mapping[str, Counts]]) -> None:
        """Take what a gateway has counted, by release and version."""
        self._conductor.count(counts)

    async def move(self, name: str, number: int, alias: str, expected: int, by: str) -> None:
        """See :class:`serve_apps.release_control.Stage`."""
        await self._promote(name, number, alias, expected, MOVE_S, by, "all")

    async def promote(
        self,
        name: str,
        number: int,
        alias: str | None = None,
        expected: int | None = None,
        timeout_s: float = 120.0,
        by: str = "promote",
        pace: Pace = "all",
    ) -> int | None:
        """Make ``name@number`` what ``alias`` means and what answers; return the number before.

        ``alias`` is by default the one that the model is deployed with; ``expected`` the version
        it must point at now. Raises ReleaseError when a replica cannot load the target, when
        ``timeout_s`` is over, or when the alias moved meanwhile; the alias then stays as it is.
        ``pace`` other than ``all``: replicas load it and answer with it in turns, and go back when
        one of them cannot; the alias moves at the end.
        """
        if release := self._conductor.running(name):
            raise ReleaseError(
                f"a release of {release.ref} runs; `roundhouse release stop {name}` ends it"
            )
        return await self._promote(name, number, alias, expected, timeout_s, by, pace)

    async def _promote(
        self,
        name: str,
        number: int,
        alias: str | None,
        expected: int | None,
        timeout_s: float,
        by: str,
        pace: Pace,
    ) -> int | None:
        target = self._library.get(name, number)
        model = self._models.get(name)
        if model is None and (served := self._served().get(name)):
            return await self._promote_adapter(
                served, target.ref, alias or CHAMPION, expected, timeout_s, by
            )
        alias = alias or (model.alias if model else None)
        if alias is None:
            raise ReleaseError(f"{name} is not deployed; `roundhouse deploy CONFIG` serves it")
        async with self._lock(name):
            now = self._library.aliases(name).get(alias)
            if expected is not None and now != expected:
                raise ReleaseError(
                    f"{name}@{alias} points to version {now}, not to {expected}; nothing changed"
                )
            if model is None or alias != model.alias:
                self._swap(name, alias, number, now, by)
                self.changed()
                return now
            until = self._clock() + timeout_s
            try:
                model.target = target.ref
                model.allowed = None if pace == "all" else set()
                self.changed()
                if pace == "all":
                    await self._until(model, name, after_load, target.ref, until, timeout_s)
                else:
                    await self._in_turns(model, target, pace, until, timeout_s)
                self._swap(name, alias, number, now, by)
                self.changed()
                await self._until(model, name, after_swap, target.ref, until, timeout_s)
            finally:
                model.target, model.progress, model.flipped = None, "", set()
                self.changed()
            return now

    async def _in_turns(
        self, model: _Model, target: Version, pace: Pace, until: float, timeout_s: float
    ) -> None:
        """Have replicas load the target and answer with it, as many at once as ``pace`` says."""
        known: set[str] = set()
        need = bytes_of(target.manifest.architecture.parameters)

        def decide(ref: str, replicas: Mapping[str, Report]) -> Decision:
            done = {who for who, report in replicas.items() if report.active == ref}
            may = granted(pace, ref, replicas, model.allowed or (), need, done)
            flipped = {who for who in may if ref in replicas[who].held}
            known.update(replicas)
            if (may, flipped) != (model.allowed, model.flipped):
                model.allowed, model.flipped = may, flipped
                self.changed()
            return turns(ref, replicas, known, flipped)

        await self._until(model, target.name, decide, target.ref, until, timeout_s)

    async def _promote_adapter(
        self, served: Served, ref: str, alias: str, expected: int | None, timeout_s: float, by: str
    ) -> int | None:
        """Move an adapter's alias once all live replicas of its base have read the version."""
        name, number = served.name, int(ref.rpartition("@")[2])
        async with self._lock(name):
            now = self._library.aliases(name).get(alias)
            if expected is not None and now != expected:
                raise ReleaseError(
                    f"{name}@{alias} points to version {now}, not to {expected}; nothing changed"
                )
            if alias == CHAMPION:
                until = self._clock() + timeout_s
                model = self._models[served.app]
                await self._until(model, served.app, after_reading, ref, until, timeout_s)
            self._swap(name, alias, number, now, by)
            self.changed()
            return now

    async def _follow(self, shelf: Shelf) -> None:
        """Keep up with the newest version of each name on the shelf, for ever."""
        while True:
            try:
                newest = await shelf.watch(self._newest)
            except RoundhouseError as error:
                log.warning("the shelf's directory: %s", error)
                await asyncio.sleep(AWAY_S)
                continue
            if newest != self._newest:
                self._newest = newest
                self.changed()

    async def _until(
        self,
        model: _Model,
        name: str,
        decide: Callable[[str, Mapping[str, Report]], Decision],
        target: str,
        until: float,
        timeout_s: float,
    ) -> None:
        moved = decide is after_swap
        state = "its alias has moved" if moved else "nothing changed"
        while True:
            match decide(target, self.live(name)):
                case Go():
                    return
                case GiveUp(reason):
                    raise ReleaseError(f"{reason}; {state}")
                case Wait(why):
                    model.progress = why
                    if self._clock() >= until:
                        raise ReleaseError(
                            f"{why}, still so after {timeout_s:g} s (--timeout); {state}"
                        )
            # a replica that dies makes no sound: look again before the bound
            await self.wait(min(until, self._clock() + 1.0))

    def _swap(self, name: str, alias: str, to: int, expected: int | None, by: str) -> None:
        if to == expected:
            return
        try:
            self._library.move_alias(name, alias, to, expected, by)
        except Conflict as error:
            raise ReleaseError(f"{error}; nothing changed") from None

    def _whole_order(self, name: str, alias: str, replica: str) -> Order:
        order = self._order(name, alias, replica)
        self._look_at_sleep()
        return replace(order, asleep=self._sleep.ordered(name))

    def _look_at_sleep(self) -> None:
        known = {
            name: Known(
                self.live(name),
                model.target is not None or self._conductor.running(name) is not None,
                functools.partial(self._estimate, name, model.alias),
            )
            for name, model in self._models.items()
        }
        if self._sleep.look(known):
            self.changed()

    def _estimate(self, name: str, alias: str) -> int:
        try:
            found = self._library.resolve(Ref(name, alias=alias))
        except LibraryError:
            return 0
        return bytes_of(found.manifest.architecture.parameters)

    def _check_deployed(self, name: str) -> None:
        if name not in self._models:
            known = ", ".join(sorted(self._models)) or "none"
            raise ReleaseError(f"{name} is not deployed; deployed models: {known}")

    def _order(self, name: str, alias: str, replica: str) -> Order:
        model = self._model(name, alias)
        if model.target and replica in model.flipped:
            return Order(model.target)
        if model.target and (model.allowed is None or replica in model.allowed):
            return Order(self._active(name, alias), model.target)
        return Order(self._active(name, alias), self._conductor.candidate(name, replica))

    def _active(self, name: str, alias: str) -> str | None:
        """Return the version that the library's record says; it may be moved by hand, too."""
        if alias == NEWEST and name in self._newest:
            return self._newest[name]
        try:
            # a bare name is its champion, and before there is one its newest version
            ref = Ref(name) if alias == CHAMPION else Ref(name, alias=alias)
            return self._library.resolve(ref).ref
        except LibraryError as error:
            log.warning("%s@%s: %s", name, alias, error)
            return None

    def live(self, name: str) -> dict[str, Report]:
        """Return the replicas of a model that have asked lately, and what they reported."""
        model = self._models.get(name)
        if model is None:
            return {}
        now = self._clock()
        for replica in [r for r, seen in model.seen_s.items() if now - seen > LIVE_S]:
            del model.reports[replica], model.seen_s[replica]
        return dict(model.reports)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._served(), self._clock() - self._born_s > LIVE_S)

    def _served(self) -> dict[str, Served]:
        served = {}
        for name, model in self._models.items():
            reports = self.live(name).values()
            if not reports:
                continue
            active = tuple(sorted({r.active for r in reports if r.active}))
            served[name] = Served(
                name=name,
                alias=model.alias,
                active=active,
                live=tuple(sorted({held for r in reports for held in r.held})),
                aliases=self._aliases(name),
                created=self._created(active[-1]) if active else 0,
                canary=self._conductor.canary(name),
                asleep=_asleep(reports),
            )
        return self._adapters(served) | served  # a deployed model goes before an adapter

    def _adapters(self, models: Mapping[str, Served]) -> dict[str, Served]:
        return {
            one.name: replace(one, aliases=self._aliases(one.name), created=self._created(ref))
            for model in models
            for one in adapters_of(model, self.live(model).values(), self._active_adapter)
            for ref in one.active
        }

    def _active_adapter(self, name: str) -> tuple[str, str] | None:
        """Return what the library's alias says of an adapter: its version and its base."""
        try:
            found = self._library.resolve(name)
        except LibraryError:
            return None
        return (found.ref, found.manifest.base) if found.manifest.base else None

    def _aliases(self, name: str) -> dict[str, int]:
        try:
            return self._library.aliases(name)
        except LibraryError as error:
            log.warning("%s: %s", name, error)
            return {}

    def _created(self, version: str) -> int:
        try:
            made = self._library.resolve(version).manifest.created
            return int(datetime.fromisoformat(made).timestamp())
        except (RoundhouseError, ValueError):
            return 0

    def _model(self, name: str, alias: str) -> _Model:
        if name not in self._models:
            self._models[name] = _Model(alias, {}, {})
            self._conductor.resume(name)
        model = self._models[name]
        model.alias = alias
        return model

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def changed(self) -> None:
        """Have everybody who waits look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait(self, until: float) -> bool:
        """Wait for the next change; return whether there was one before ``until``.

        Nothing is missed between a look and this call: it takes the event before it suspends.
        """
        changed, left = self._changed, until - self._clock()
        if left <= 0:
            return False
        try:
            # not wait_for: in Python 3.11 it may swallow a cancellation
            async with asyncio.timeout(left):
                await changed.wait()
        except TimeoutError:
            return False
        return True


def _asleep(reports: Collection[Report]) -> bool:
    return bool(reports) and all(report.asleep for report in reports)
