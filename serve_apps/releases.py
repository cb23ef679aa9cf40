"""The Releases actor: which version answers, and promotions in two phases.

The library's aliases are the record; everything else here is what replicas reported lately, so
after a crash the next polls rebuild it. First all live replicas load the target beside what they
have; only then the alias moves, by compare-and-swap; then they activate it, let the requests of
the old version finish, and release it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from cluster.errors import Conflict, LibraryError, ReleaseError, RoundhouseError
from cluster.library.ref import CHAMPION, NEWEST, Ref
from cluster.library.store import Library
from serve_apps.adapter_policy import adapters_of, after_reading
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
    ) -> None:
        """``shelf`` tells of versions that running jobs have put there."""
        self._library, self._shelf = library or Library(), shelf
        self._newest: dict[str, str] = {}
        self._following: asyncio.Task[None] | None = None
        self._revision = revision
        self._clock, self._born_s = clock, clock()
        self._models: dict[str, _Model] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._changed = asyncio.Event()

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
        while (order := self._order(name, alias)) == have:
            # one that left meanwhile must not be brought back by its last question
            if not await self._wait(until) or name not in self._models:
                break
        return order

    async def report(self, name: str, alias: str, replica: str, report: Report) -> None:
        """Take what a replica has just brought about."""
        model = self._model(name, alias)
        model.seen_s[replica] = self._clock()
        if model.reports.get(replica) != report:
            model.reports[replica] = report
            self._tell()

    async def leave(self, name: str, replica: str) -> None:
        """Forget a replica that shuts down."""
        if (model := self._models.get(name)) and model.reports.pop(replica, None) is not None:
            model.seen_s.pop(replica, None)
            if not model.reports and model.target is None:
                del self._models[name]  # undeployed; a crash says no goodbye
            self._tell()

    async def snapshot(self, have: Snapshot | None = None) -> Snapshot:
        """Return what gateways need about every model, once it differs from ``have``."""
        until = self._clock() + WATCH_S
        while (now := self._snapshot()) == have:
            if not await self._wait(until):
                break
        return now

    async def names(self) -> list[str]:
        """Return the models that are deployed, those whose replicas are being rebuilt included."""
        return sorted({*self._models, *self._served()})

    async def progress(self, name: str) -> str:
        """Return one line on the promotion that runs for ``name``; empty when none does."""
        model = self._models.get(name)
        return model.progress if model else ""

    async def promote(
        self,
        name: str,
        number: int,
        alias: str | None = None,
        expected: int | None = None,
        timeout_s: float = 120.0,
        by: str = "promote",
    ) -> int | None:
        """Make ``name@number`` what ``alias`` means and what answers; return the number before.

        ``alias`` is by default the one that the model is deployed with; ``expected`` the version
        it must point at now. Raises ReleaseError when a replica cannot load the target, when
        ``timeout_s`` is over, or when the alias moved meanwhile; the alias then stays as it is.
        """
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
                self._tell()
                return now
            until = self._clock() + timeout_s
            try:
                model.target = target.ref
                self._tell()
                await self._until(model, name, after_load, target.ref, until, timeout_s)
                self._swap(name, alias, number, now, by)
                self._tell()
                await self._until(model, name, after_swap, target.ref, until, timeout_s)
            finally:
                model.target, model.progress = None, ""
                self._tell()
            return now

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
            self._tell()
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
                self._tell()

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
            match decide(target, self._live(name)):
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
            await self._wait(min(until, self._clock() + 1.0))

    def _swap(self, name: str, alias: str, to: int, expected: int | None, by: str) -> None:
        if to == expected:
            return
        try:
            self._library.move_alias(name, alias, to, expected, by)
        except Conflict as error:
            raise ReleaseError(f"{error}; nothing changed") from None

    def _order(self, name: str, alias: str) -> Order:
        model = self._model(name, alias)
        return Order(self._active(name, alias), model.target)

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

    def _live(self, name: str) -> dict[str, Report]:
        model = self._models[name]
        now = self._clock()
        for replica in [r for r, seen in model.seen_s.items() if now - seen > LIVE_S]:
            del model.reports[replica], model.seen_s[replica]
        return dict(model.reports)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._served(), self._clock() - self._born_s > LIVE_S)

    def _served(self) -> dict[str, Served]:
        served = {}
        for name, model in self._models.items():
            reports = self._live(name).values()
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
            )
        return self._adapters(served) | served  # a deployed model goes before an adapter

    def _adapters(self, models: Mapping[str, Served]) -> dict[str, Served]:
        return {
            one.name: replace(one, aliases=self._aliases(one.name), created=self._created(ref))
            for model in models
            for one in adapters_of(model, self._live(model).values(), self._active_adapter)
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
        model = self._models.setdefault(name, _Model(alias, {}, {}))
        model.alias = alias
        return model

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _wait(self, until: float) -> bool:
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
