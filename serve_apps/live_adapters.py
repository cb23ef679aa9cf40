"""Adapters that a run goes on training (``adapters: [NAME@live]``), as they come to the shelf.

Each new version is read beside the one before and takes its place; that one is released when its
requests have ended. The base is not touched. They take none of the library's places in the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from cluster.errors import EngineError, RankLost, RequestError, RoundhouseError
from serve_apps.engine.interface import Engine
from serve_apps.shelf import Shelf, read_base

Base = Callable[[str, str], Awaitable[tuple[str, bool]]]
"""From an adapter and what it is made for: the version that it adds to, and whether that is held.
EngineError where it is none of this model."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Held:
    """A version in the engine."""

    base: str
    users: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class LiveAdapters:
    """``follow`` what is ordered; ``using`` around each request."""

    def __init__(
        self,
        engine: Engine,
        shelf: Shelf | None,
        drain_s: float,
        base: Base,
        holds: Callable[[str], bool],
    ) -> None:
        """Ask ``base`` what an adapter adds to, and ``holds`` whether that is still there."""
        self._engine, self._shelf, self._drain_s = engine, shelf, drain_s
        self._base, self._holds = base, holds
        self.current: dict[str, str] = {}
        """The version that answers for a name."""
        self.problems: dict[str, str] = {}
        """Why what is ordered does not answer."""
        self._held: dict[str, Held] = {}
        self._refused: dict[str, str] = {}  # for what they are: nothing is tried again
        self._coming: dict[str, str] = {}  # wait for a base to be loaded
        self._retiring: dict[str, tuple[str, asyncio.Task[None]]] = {}

    @property
    def fits(self) -> dict[str, str]:
        """The versions that may be asked for, each with its base."""
        return {ref: held.base for ref, held in self._held.items()}

    @property
    def pinned(self) -> set[str]:
        """Bases that have to stay, or to come."""
        going = {base for base, _ in self._retiring.values()}
        return {*self.fits.values(), *self._coming.values(), *going}

    def lacks(self, ref: str | None) -> bool:
        """Say whether a version could still come that is not held."""
        return ref is not None and ref not in self._held and ref not in self.problems

    async def follow(self, ordered: Mapping[str, str]) -> None:
        """Hold the version of each name that is ordered; what is no more in use goes."""
        wanted = {*ordered.values()}
        self._refused = {ref: why for ref, why in self._refused.items() if ref in wanted}
        self._coming, problems = {}, dict(self._refused)
        for name, ref in sorted(ordered.items()):
            if ref not in self._held and ref not in self._refused:
                try:
                    await self._load(ref)
                except RankLost:
                    raise
                except RoundhouseError as error:  # the one before goes on answering
                    problems[ref] = str(error)
            if ref in self._held:
                self.current[name] = ref
            elif base := self._coming.get(ref):
                problems[ref] = f"{ref} waits for its base {base} to be loaded"
        for name in set(self.current) - set(ordered):
            del self.current[name]
        for ref in set(self._held) - {*self.current.values()}:
            self._retire(ref, self._held.pop(ref))
        self.problems = problems

    @contextmanager
    def using(self, ref: str) -> Iterator[str]:
        """Keep a version in the engine within this block; yields its base."""
        held = self._held.get(ref)
        if held is None:
            raise RequestError(f"{ref} is not live any more", 404, "model_not_found", "model")
        held.users += 1
        held.idle.clear()
        try:
            yield held.base
        finally:
            held.users -= 1
            if not held.users:
                held.idle.set()

    def forget(self) -> None:
        """Take note that the engine was ended, with all that it held."""
        self.current.clear()
        self._held.clear()
        self._refused.clear()  # it may have been on its way down

    async def stop(self) -> None:
        """Wait for nobody any more: the engine ends."""
        tasks = [task for _, task in self._retiring.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, ref: str) -> None:
        """Read a version into the engine, if its base is there; what it cannot be is refused."""
        if self._shelf is None:
            return
        if going := self._retiring.get(ref):
            await asyncio.shield(going[1])  # at most drain_s
        folder, base = await self._shelf.bring(ref), None
        try:
            made_for = read_base(folder)
            if made_for is None:
                why = f"{ref} is a model, not an adapter: deploy it by itself"
                raise EngineError(why)
            base, held = await self._base(ref, made_for)
            if not held:
                self._coming[ref] = base
                return
            await self._engine.load_adapter(ref, base, str(folder), self._shelf.holder)
        except RankLost:
            raise
        except EngineError as error:
            if base is None or self._holds(base):  # else the base has gone in between
                self._refused[ref] = str(error)
            raise
        finally:
            await self._shelf.leave(ref)
        self._held[ref] = Held(base)
        self._held[ref].idle.set()
        log.info("holds %s beside %s", ref, base)

    def _retire(self, ref: str, held: Held) -> None:
        self._retiring[ref] = held.base, asyncio.create_task(self._release(ref, held))

    async def _release(self, ref: str, held: Held) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._drain_s):
                    await held.idle.wait()
            await self._engine.release_adapter(ref, 0.0)
            log.info("released %s", ref)
        except EngineError as error:  # it went with its base
            log.info("%s", error)
        finally:
            del self._retiring[ref]
