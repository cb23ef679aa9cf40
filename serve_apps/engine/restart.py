"""An engine that may be stopped and started again: each start makes a new one."""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import EngineError
from serve_apps.engine.interface import (
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    Stream,
)


class Restartable(Engine):
    """See :class:`Engine`. After ``stop`` nothing but ``info`` and ``start`` is legal."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._latest: Engine = make()
        self._running = False

    @property
    def _inner(self) -> Engine:
        if not self._running:
            raise EngineError("the engine is not running")
        return self._latest

    @property
    def info(self) -> EngineInfo:
        """What the last one could do, while there is none."""
        return self._latest.info

    @property
    def rank_pids(self) -> list[int]:
        """Processes of the engine, where it has any."""
        return list(getattr(self._latest, "rank_pids", ())) if self._running else []

    async def start(self) -> EngineInfo:
        """Start a new engine, unless one runs."""
        if not self._running:
            self._latest = self._make()
            await self._latest.start()
            self._running = True
        return self._latest.info

    async def stop(self, drain_s: float = 0.0) -> None:
        """See :class:`Engine`."""
        if self._running:
            self._running = False
            await self._latest.stop(drain_s)

    async def load(self, version: str, directory: str, holder: str | None = None) -> None:
        """See :class:`Engine`."""
        await self._inner.load(version, directory, holder)

    async def activate(self, version: str) -> None:
        """See :class:`Engine`."""
        await self._inner.activate(version)

    async def release(self, version: str, drain_s: float) -> None:
        """See :class:`Engine`."""
        await self._inner.release(version, drain_s)

    async def move(self, source: str, target: str) -> int:
        """See :class:`Engine`."""
        return await self._inner.move(source, target)

    async def load_adapter(
        self, adapter: str, base: str, directory: str, holder: str | None = None
    ) -> None:
        """See :class:`Engine`."""
        await self._inner.load_adapter(adapter, base, directory, holder)

    async def release_adapter(self, adapter: str, drain_s: float) -> None:
        """See :class:`Engine`."""
        await self._inner.release_adapter(adapter, drain_s)

    def generate(self, request: EngineRequest, version: str | None = None) -> Stream:
        """See :class:`Engine`."""
        return self._inner.generate(request, version)

    async def abort(self, request_id: str) -> None:
        """See :class:`Engine`."""
        await self._inner.abort(request_id)

    async def check_health(self) -> None:
        """See :class:`Engine`."""
        await self._inner.check_health()

    async def stats(self) -> EngineStats:
        """See :class:`Engine`."""
        return await self._inner.stats()
