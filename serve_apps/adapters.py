"""The LoRA adapters that a replica answers with, each under a name of its own.

An adapter is a library entry that pins the version it adds to (``base: name@3``). What is served is
a matter of the library: names of the configuration, or every adapter whose base this replica
holds. They are read into the engine when they are asked for, and the one that nobody has used for
longest makes room. A base that an adapter pins stays in memory when its alias moves on: a new
version of the base never moves an adapter. A name that follows the shelf answers with what a run
has put there (:mod:`serve_apps.live_adapters`), and with the library's while there is none.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.errors import EngineError, RankLost, RequestError, RoundhouseError
from cluster.library.store import Library
from serve_apps.adapter_finder import Finder, Found
from serve_apps.config import ModelConfig
from serve_apps.engine.interface import Engine
from serve_apps.live_adapters import LiveAdapters
from serve_apps.shelf import Shelf
from serve_apps.versions import Versions

LOOK_S = 2.0
"""Between two looks at the library: new versions, names and aliases."""
RETRY_AFTER_S = 2

log = logging.getLogger(__name__)


class Adapters:
    """``start`` first; ``using`` for each call; ``stop`` at the end."""

    def __init__(
        self,
        config: ModelConfig,
        engine: Engine,
        library: Library,
        versions: Versions,
        shelf: Shelf | None = None,
    ) -> None:
        """Without a ``shelf`` there are no versions but those of the library."""
        self._config, self._engine, self._versions = config, engine, versions
        self._finder, self._found = Finder(config, library), Found()
        self._live = LiveAdapters(engine, shelf, config.drain_s, self._base, versions.holds)
        self._slept = versions.slept
        self._users: OrderedDict[str, int] = OrderedDict()  # loaded ones, least recently used first
        self._refused: dict[str, str] = {}  # by the engine, for what is in their files
        self._lock, self._looking = asyncio.Lock(), asyncio.Lock()
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look once, then go on looking; nothing is done where no adapters are configured."""
        if not self._config.adapters:
            return
        await self.look()
        self._following = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Stop looking."""
        if self._following:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._live.stop()

    def check(self) -> None:
        """Raise EngineError when the looking has stopped."""
        if self._following and self._following.done():
            raise EngineError(f"the replica looks for no adapters any more: {self._following}")

    @asynccontextmanager
    async def using(self, version: str | None) -> AsyncIterator[tuple[str, str] | None]:
        """Keep an adapter in the engine within this block; yields its version and its base.

        A bare name means what answers for it here. None for what is no adapter of this replica.
        RequestError when it cannot be loaded.
        """
        if version is None or not self._config.adapters or self._versions.holds(version):
            yield None
            return
        if self._slept != self._versions.slept:
            await self.look()
        if "@" not in version:
            version = await self._answering(version)
        if version in self._live.fits:
            with self._live.using(version) as base:
                yield version, base
            return
        if version not in self._found.fits:
            await self.look()  # it may be newer than the last look
        if version not in self._found.fits:
            if why := self._found.problems.get(version):
                raise RequestError(why, 404, "model_not_found", "model")
            yield None
            return
        base = await self._enter(version)
        try:
            yield version, base
        finally:
            if version in self._users:
                self._users[version] -= 1

    async def _answering(self, name: str) -> str:
        """Return the version that answers for a name which follows the shelf."""
        ordered = self._versions.ordered_adapters.get(name)
        if self._live.lacks(ordered) or name not in {*self._live.current, *self._found.active}:
            await self.look()  # it has just been ordered, or nothing is there yet
        ref = self._live.current.get(name) or self._found.active.get(name)
        if ref is None:
            why = self._live.problems.get(ordered or "") or f"no version of {name} is live"
            raise RequestError(why, 404, "model_not_found", "model")
        return ref

    async def look(self) -> None:
        """Take in what the library says now, load what answers, tell the board."""
        async with self._looking:
            if self._slept != self._versions.slept:
                self._slept = self._versions.slept
                self._users.clear()  # they went with the engine
                self._live.forget()
            if self._versions.sleeper.ready:
                await self._look()

    async def _look(self) -> None:
        ordered = self._versions.ordered_adapters
        covered = set(ordered) & set(self._live.current)
        found = await asyncio.to_thread(
            self._finder.find, self._versions.held, dict(self._refused), covered
        )
        self._warn(found.problems, self._found.problems)
        self._found = found
        self._refused = {ref: why for ref, why in self._refused.items() if ref in found.problems}
        # The newest is what will be promoted next: to read it tells whether it fits
        newest = {ref.partition("@")[0]: ref for ref in found.fits}
        answering = [ref for name, ref in found.active.items() if name not in covered]
        for ref in dict.fromkeys((*answering, *newest.values())):
            if ref not in self._users and len(self._users) < self._config.engine.max_adapters:
                await self._preload(ref)
        for ref in self._versions.tried_adapters:  # others make room
            if ref in found.fits and ref not in self._users:
                await self._preload(ref)
        before = self._live.problems
        await self._live.follow(ordered)
        self._warn(self._live.problems, before)
        fits = {ref: base for ref, (_, base) in self._found.fits.items()} | self._live.fits
        answers = self._found.active | self._live.current
        active = tuple(sorted(ref for ref in answers.values() if ref in fits))
        unfit = self._found.problems | self._live.problems
        pinned = self._found.pinned | self._live.pinned
        read = tuple(sorted({*self._users, *self._live.fits}))
        await self._versions.tell_adapters(fits, active, unfit, pinned, read)

    def _warn(self, problems: dict[str, str], before: dict[str, str]) -> None:
        for name, why in problems.items():
            if before.get(name) != why:
                log.warning("adapter %s is not served: %s", name, why)

    async def _base(self, ref: str, made_for: str) -> tuple[str, bool]:
        held = self._versions.held
        return await asyncio.to_thread(self._finder.base_of, ref, made_for, held)

    async def _follow(self) -> None:
        while True:
            await self._versions.adapters_ordered(LOOK_S)
            try:
                await self.look()
            except RoundhouseError as error:
                log.warning("no look at the adapters: %s", error)

    async def _preload(self, ref: str) -> None:
        try:
            await self._enter(ref)
        except RequestError as error:
            log.warning("%s", error)
            return
        self._users[ref] -= 1

    async def _enter(self, ref: str) -> str:
        """Load an adapter if need be, and count one user more; returns its base."""
        async with self._lock:
            if ref not in self._found.fits:  # refused while this one waited
                why = self._found.problems.get(ref, f"adapter {ref} is not served any more")
                raise RequestError(why, 404, "model_not_found", "model")
            version, base = self._found.fits[ref]
            if ref not in self._users:
                await self._make_room()
            try:
                await self._engine.load_adapter(ref, base, str(version.path))
            except RankLost:
                raise
            except EngineError as error:
                self._users.pop(ref, None)
                if not self._versions.sleeper.ready or base not in self._versions.held:
                    # its fault it is not: the model goes to sleep, or the base has just gone
                    raise RequestError(str(error), 503, "unavailable", "model", 1) from None
                self._refused[ref] = str(error)
                self._found.fits.pop(ref, None)
                self._found.problems[ref] = str(error)
                raise RequestError(str(error), 404, "model_not_found", "model") from None
            self._users[ref] = self._users.get(ref, 0) + 1
            self._users.move_to_end(ref)
            return base

    async def _make_room(self) -> None:
        most = self._config.engine.max_adapters
        while len(self._users) >= most:
            idle = next((ref for ref, users in self._users.items() if not users), None)
            if idle is None:
                raise RequestError(
                    f"{most} adapters answer right now, the most that this model holds "
                    "(engine.max_adapters); try again later",
                    503,
                    "adapters_full",
                    "model",
                    RETRY_AFTER_S,
                )
            del self._users[idle]
            try:
                await self._engine.release_adapter(idle, self._config.drain_s)
            except EngineError as error:  # it went with its base
                log.info("%s", error)
