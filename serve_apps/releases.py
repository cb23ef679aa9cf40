"""The Releases actor: which version answers.

The library's aliases are the record; everything else here is what replicas reported lately, so
after a crash the next polls rebuild it. Replicas ask for orders, gateways for a snapshot of what
is served; people ask for promotions and releases.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from cluster.errors import ReleaseError, RoundhouseError
from cluster.library.ref import NEWEST, Update
from cluster.library.releases import Release
from cluster.library.store import Library
from serve_apps.adapter_policy import names_of
from serve_apps.catalogue import Catalogue
from serve_apps.deployed import Deployed, Model, asleep
from serve_apps.promotions import Promotions
from serve_apps.release_config import Pace, ReleasePolicy
from serve_apps.release_control import Conductor
from serve_apps.release_counts import Counts
from serve_apps.release_policy import LIVE_S, WATCH_S, Order, Report, Served, Snapshot
from serve_apps.release_witness import Asker
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
        self._following: asyncio.Task[None] | None = None
        self._revision = revision
        self._clock, self._born_s = clock, clock()
        self._deployed = Deployed(clock)
        self._models = self._deployed.models
        self._conductor = Conductor(self._library, self, asker, clock)
        self._resumed: set[str] = set()
        self._catalogue = Catalogue(self._library, self._deployed, self._conductor.canary)
        self._promotions = Promotions(self._library, self._deployed, self._served)
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
        follows = alias == NEWEST or report.follows
        if self._shelf and follows and self._following is None:
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
        self._model(name, alias)
        self._deployed.report(name, replica, report)
        for adapter in names_of(report) - self._resumed:
            self._resumed.add(adapter)
            self._conductor.resume(adapter)

    async def leave(self, name: str, replica: str) -> None:
        """Forget a replica that shuts down."""
        report = self.live(name).get(replica, Report())
        for one in (name, *names_of(report)):
            self._conductor.left(one, replica)
        self._deployed.leave(name, replica)

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
        return {name: asleep(self.live(name).values()) for name in self._models}

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
        alias = self._alias_to_release(name)
        champion = self._library.aliases(name).get(alias)
        if champion is None:
            raise ReleaseError(
                f"{name}@{alias} points to nothing; `roundhouse promote {name}@N` first"
            )
        if champion == number:
            raise ReleaseError(f"{candidate.ref} is {name}@{alias} already")
        if alias == CANDIDATE:
            raise ReleaseError(f"{name} is deployed as @{CANDIDATE}, which a release moves itself")
        async with self._promotions.lock(name):
            self._conductor.check(name, policy)
            self._promotions.swap(
                name, CANDIDATE, number, self._library.aliases(name).get(CANDIDATE), by
            )
            release = self._conductor.start(name, alias, champion, number, policy, by)
        self.changed()
        return release

    def _alias_to_release(self, name: str) -> str:
        """Return the alias that answers for a model or an adapter; ReleaseError where none does."""
        if model := self._models.get(name):
            return model.alias
        served = self._served().get(name)
        if served is None:
            raise ReleaseError(
                f"{name} is not deployed; a release needs replicas that answer for it"
            )
        if served.alias == NEWEST:
            raise ReleaseError(
                f"{name} follows the shelf ({name}@{NEWEST} under `adapters`), and a release moves "
                f"an alias of the library; deploy it as {name}"
            )
        return served.alias

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
        await self._promotions.promote(name, number, alias, expected, MOVE_S, by, "all")

    async def promote(
        self,
        name: str,
        number: int,
        alias: str | None = None,
        expected: int | None = None,
        timeout_s: float = 120.0,
        by: str = "promote",
        pace: Pace = "all",
        update: Update | None = None,
    ) -> int | None:
        """Make ``name@number`` what ``alias`` means and what answers; return the number before.

        ``alias`` is by default the one that the model is deployed with; ``expected`` the version
        it must point at now. Raises ReleaseError when a replica cannot load the target, when
        ``timeout_s`` is over, or when the alias moved meanwhile; the alias then stays as it is.
        ``pace`` other than ``all``: replicas load it and answer with it in turns, and go back when
        one of them cannot; the alias moves at the end. ``update`` says what becomes of requests
        that run; by default the model's configuration does, as after a crash of this process.
        """
        if release := self._conductor.running(name):
            raise ReleaseError(
                f"a release of {release.ref} runs; `roundhouse release stop {name}` ends it"
            )
        return await self._promotions.promote(
            name, number, alias, expected, timeout_s, by, pace, update
        )

    async def _follow(self, shelf: Shelf) -> None:
        """Keep up with the newest version of each name on the shelf, for ever."""
        while True:
            try:
                newest = await shelf.watch(self._catalogue.newest)
            except RoundhouseError as error:
                log.warning("the shelf's directory: %s", error)
                await asyncio.sleep(AWAY_S)
                continue
            if newest != self._catalogue.newest:
                self._catalogue.newest = newest
                self.changed()

    def _whole_order(self, name: str, alias: str, replica: str) -> Order:
        order = self._order(name, alias, replica)
        self._look_at_sleep()
        report = self._models[name].reports.get(replica, Report())
        tried = map(self._conductor.running, sorted(names_of(report)))
        return replace(
            order,
            asleep=self._sleep.ordered(name),
            adapters=self._catalogue.newest_of(report.follows),
            tries=tuple(release.ref for release in tried if release),
        )

    def _look_at_sleep(self) -> None:
        known = {
            name: Known(
                self.live(name),
                model.target is not None or self._is_released(name),
                functools.partial(self._catalogue.estimate, name, model.alias),
            )
            for name, model in self._models.items()
        }
        if self._sleep.look(known):
            self.changed()

    def _is_released(self, name: str) -> bool:
        """Say whether a release of a model, or of one of its adapters, runs."""
        adapters = (names_of(report) for report in self.live(name).values())
        return any(self._conductor.running(one) for one in set().union({name}, *adapters))

    def _check_deployed(self, name: str) -> None:
        if name not in self._models:
            known = ", ".join(sorted(self._models)) or "none"
            raise ReleaseError(f"{name} is not deployed; deployed models: {known}")

    def _order(self, name: str, alias: str, replica: str) -> Order:
        model = self._model(name, alias)
        if model.target and replica in model.flipped:
            return Order(model.target, update=model.update)
        if model.target and (model.allowed is None or replica in model.allowed):
            active = self._catalogue.active(name, alias)
            return Order(active, model.target, update=model.update)
        return Order(self._catalogue.active(name, alias), self._conductor.candidate(name, replica))

    def live(self, name: str) -> dict[str, Report]:
        """See :class:`serve_apps.release_control.Stage`."""
        return self._deployed.live_of(name)

    def model_of(self, name: str) -> str:
        """See :class:`serve_apps.release_control.Stage`."""
        return self._deployed.model_of(name) or name

    def changed(self) -> None:
        """Have everybody who waits look again."""
        self._deployed.changed()

    async def wait(self, until: float) -> bool:
        """Wait for the next change; return whether there was one before ``until``."""
        return await self._deployed.wait(until)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._served(), self._clock() - self._born_s > LIVE_S)

    def _served(self) -> dict[str, Served]:
        return self._catalogue.served()

    def _model(self, name: str, alias: str) -> Model:
        if name not in self._models:
            self._models[name] = Model(alias, {}, {})
            self._conductor.resume(name)
        model = self._models[name]
        model.alias = alias
        return model
