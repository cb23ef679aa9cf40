"""The LoRA adapters that a replica answers with, each under a name of its own.

An adapter is a library entry that pins the version it adds to (``base: name@3``). What is served is
a matter of the library alone: names of the configuration, or every adapter whose base this replica
holds. They are read into the engine when they are asked for, and the one that nobody has used for
longest makes room. A base that an adapter pins stays in memory when its alias moves on: a new
version of the base never moves an adapter.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cluster.errors import EngineError, LibraryError, RankLost, RequestError, RoundhouseError
from cluster.library.store import Library, Version
from serve_apps.config import ModelConfig
from serve_apps.engine.interface import Engine
from serve_apps.engine.lora_files import read_facts
from serve_apps.versions import Versions

LOOK_S = 2.0
"""Between two looks at the library: new versions, names and aliases."""
RETRY_AFTER_S = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at the library gave."""

    fits: dict[str, tuple[Version, str]] = field(default_factory=dict)
    """Adapters by reference, each with the held version that it adds to."""
    active: dict[str, str] = field(default_factory=dict)
    """The reference that answers for a bare name."""
    pinned: frozenset[str] = frozenset()
    """Bases that named adapters need."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why a name or a reference is not served."""


class Adapters:
    """``start`` first; ``using`` for each call; ``stop`` at the end."""

    def __init__(
        self, config: ModelConfig, engine: Engine, library: Library, versions: Versions
    ) -> None:
        self._config, self._engine = config, engine
        self._library, self._versions = library, versions
        self._found = Found()
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

    def check(self) -> None:
        """Raise EngineError when the looking has stopped."""
        if self._following and self._following.done():
            raise EngineError(f"the replica looks for no adapters any more: {self._following}")

    @asynccontextmanager
    async def using(self, version: str | None) -> AsyncIterator[str | None]:
        """Keep an adapter in the engine within this block; yields its base.

        None for what is no adapter of this replica. RequestError when it cannot be loaded.
        """
        if version is None or not self._config.adapters or self._versions.holds(version):
            yield None
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
            yield base
        finally:
            if version in self._users:
                self._users[version] -= 1

    async def look(self) -> None:
        """Take in what the library says now, load what answers, tell the board."""
        async with self._looking:
            if self._versions.sleeper.ready:
                await self._look()
            else:
                self._users.clear()  # they went with the engine

    async def _look(self) -> None:
        held = self._versions.held
        found = await asyncio.to_thread(self._find, held)
        for name, why in found.problems.items():
            if self._found.problems.get(name) != why:
                log.warning("adapter %s is not served: %s", name, why)
        self._found = found
        self._refused = {ref: why for ref, why in self._refused.items() if ref in found.problems}
        # The newest is what will be promoted next: to read it tells whether it fits
        newest = {ref.partition("@")[0]: ref for ref in found.fits}
        for ref in dict.fromkeys((*found.active.values(), *newest.values())):
            if ref not in self._users and len(self._users) < self._config.engine.max_adapters:
                await self._preload(ref)
        fits = {ref: base for ref, (_, base) in self._found.fits.items()}
        active = tuple(sorted(ref for ref in self._found.active.values() if ref in fits))
        unfit = dict(self._found.problems)
        await self._versions.tell_adapters(fits, active, unfit, self._found.pinned)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
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

    # In a thread: the library is on disk

    def _find(self, held: frozenset[str]) -> Found:
        found, pinned = Found(), set[str]()
        bases = {digest: ref for ref in sorted(held) if (digest := self._digest(ref))}
        for name in self._names():
            try:
                answers = self._library.resolve(name)
            except LibraryError as error:
                found.problems[name] = str(error)
                continue
            for version in self._library.versions(name):
                self._judge(version, answers, held, bases, found)
            if answers.ref in found.fits:
                found.active[name] = answers.ref
            base = answers.manifest.base
            if self._config.adapters != "auto" and base and base not in bases.values():
                pinned.update(self._pin(base, bases))
        pinned.update(self._needed(found, held))
        return Found(found.fits, found.active, frozenset(pinned), found.problems)

    def _names(self) -> list[str]:
        if self._config.adapters != "auto":
            return list(self._config.adapters)
        known = self._library.names()
        return [n for n in known if self._is_adapter(n)]

    def _is_adapter(self, name: str) -> bool:
        try:
            return self._library.resolve(name).manifest.kind == "adapter"
        except LibraryError:
            return False

    def _judge(
        self,
        version: Version,
        answers: Version,
        held: frozenset[str],
        bases: dict[str, str],
        found: Found,
    ) -> None:
        """Enter a version among those that fit, or among the problems."""
        ref, pinned = version.ref, version.manifest.base
        try:
            if version.manifest.kind != "adapter" or pinned is None:
                raise EngineError(f"{ref} is a model, not an adapter: deploy it by itself")
            if ref in self._refused:
                raise EngineError(self._refused[ref])
            base = pinned if pinned in held else bases.get(self._digest(pinned))
            if base is None:
                raise EngineError(
                    f"adapter {ref} is made for {pinned}, and this replica holds "
                    f"{', '.join(sorted(held)) or 'no version'}: name the adapter in `adapters` to "
                    "have its base kept, or train it on this one"
                )
            engine = self._config.engine
            if engine.kind == "sharded":
                read_facts(version.path, ref, engine.max_lora_rank)
        except RoundhouseError as error:
            found.problems[ref] = str(error)
            return
        found.fits[ref] = version, base

    def _digest(self, ref: str) -> str:
        try:
            return self._library.resolve(ref).manifest.digest
        except LibraryError:
            return ""

    def _pin(self, base: str, bases: dict[str, str]) -> set[str]:
        """Return the base to load for a named adapter, if it is of this model."""
        same = base.partition("@")[0] == self._config.name
        return {base} if same and self._digest(base) not in {*bases, ""} else set()

    def _needed(self, found: Found, held: frozenset[str]) -> set[str]:
        """Return the held versions that named adapters answer with: these stay."""
        if self._config.adapters == "auto":
            return set()
        return {found.fits[ref][1] for ref in found.active.values()} & held
