"""A promotion in two phases.

First all live replicas load the target beside what they have; only then the alias moves, by
compare-and-swap; then they activate it, let the requests of the old version finish, and release it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from cluster.errors import Conflict, ReleaseError
from cluster.library.ref import Update
from cluster.library.store import Library, Version
from serve_apps.adapter_policy import after_reading
from serve_apps.deployed import Deployed, Model
from serve_apps.release_config import Pace
from serve_apps.release_policy import (
    Decision,
    GiveUp,
    Go,
    Report,
    Served,
    Wait,
    after_load,
    after_swap,
)
from serve_apps.rollout import bytes_of, granted, turns


class Promotions:
    """Those of one name take turns; nothing of them outlives this process but the alias."""

    def __init__(
        self, library: Library, deployed: Deployed, served: Callable[[], Mapping[str, Served]]
    ) -> None:
        """Go by ``served`` for what answers now, adapters included."""
        self._library, self._deployed, self._served = library, deployed, served
        self._locks: dict[str, asyncio.Lock] = {}

    def lock(self, name: str) -> asyncio.Lock:
        """Return what is held while an alias of ``name`` moves."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def promote(
        self,
        name: str,
        number: int,
        alias: str | None,
        expected: int | None,
        timeout_s: float,
        by: str,
        pace: Pace,
        update: Update | None = None,
    ) -> int | None:
        """See :meth:`serve_apps.releases.Releases.promote`."""
        target = self._library.get(name, number)
        model = self._deployed.models.get(name)
        if model is None and (served := self._served().get(name)):
            if update == "recompute":
                raise ReleaseError(
                    f"{name} is an adapter, whose requests finish on the version that they began "
                    "with; leave out --update"
                )
            return await self._promote_adapter(
                served, target.ref, alias or served.alias, expected, timeout_s, by
            )
        alias = alias or (model.alias if model else None)
        if alias is None:
            raise ReleaseError(f"{name} is not deployed; `roundhouse deploy CONFIG` serves it")
        async with self.lock(name):
            now = self._expected(name, alias, expected)
            if model is None or alias != model.alias:
                self.swap(name, alias, number, now, by)
                self._deployed.changed()
                return now
            until = self._deployed.clock() + timeout_s
            try:
                model.target, model.update = target.ref, update
                model.allowed = None if pace == "all" else set()
                self._deployed.changed()
                if pace == "all":
                    await self._until(model, name, after_load, target.ref, until, timeout_s)
                else:
                    await self._in_turns(model, target, pace, until, timeout_s)
                self.swap(name, alias, number, now, by)
                self._deployed.changed()
                await self._until(model, name, after_swap, target.ref, until, timeout_s)
            finally:
                model.target, model.progress, model.flipped = None, "", set()
                model.update = None
                self._deployed.changed()
            return now

    def swap(self, name: str, alias: str, to: int, expected: int | None, by: str) -> None:
        """Move an alias by compare-and-swap; ReleaseError where somebody else was faster."""
        if to == expected:
            return
        try:
            self._library.move_alias(name, alias, to, expected, by)
        except Conflict as error:
            raise ReleaseError(f"{error}; nothing changed") from None

    async def _in_turns(
        self, model: Model, target: Version, pace: Pace, until: float, timeout_s: float
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
                self._deployed.changed()
            return turns(ref, replicas, known, flipped)

        await self._until(model, target.name, decide, target.ref, until, timeout_s)

    async def _promote_adapter(
        self, served: Served, ref: str, alias: str, expected: int | None, timeout_s: float, by: str
    ) -> int | None:
        """Move an adapter's alias once all live replicas of its base have read the version."""
        name, number = served.name, int(ref.rpartition("@")[2])
        async with self.lock(name):
            now = self._expected(name, alias, expected)
            if alias == served.alias:
                until = self._deployed.clock() + timeout_s
                model = self._deployed.models[served.app]
                await self._until(model, served.app, after_reading, ref, until, timeout_s)
            self.swap(name, alias, number, now, by)
            self._deployed.changed()
            return now

    def _expected(self, name: str, alias: str, expected: int | None) -> int | None:
        """Return where an alias points; ReleaseError where that is not ``expected``."""
        now = self._library.aliases(name).get(alias)
        if expected is not None and now != expected:
            raise ReleaseError(
                f"{name}@{alias} points to version {now}, not to {expected}; nothing changed"
            )
        return now

    async def _until(
        self,
        model: Model,
        name: str,
        decide: Callable[[str, Mapping[str, Report]], Decision],
        target: str,
        until: float,
        timeout_s: float,
    ) -> None:
        moved = decide is after_swap
        state = "its alias has moved" if moved else "nothing changed"
        while True:
            match decide(target, self._deployed.live(name)):
                case Go():
                    return
                case GiveUp(reason):
                    raise ReleaseError(f"{reason}; {state}")
                case Wait(why):
                    model.progress = why
                    if self._deployed.clock() >= until:
                        raise ReleaseError(
                            f"{why}, still so after {timeout_s:g} s (--timeout); {state}"
                        )
            # a replica that dies makes no sound: look again before the bound
            await self._deployed.wait(min(until, self._deployed.clock() + 1.0))
