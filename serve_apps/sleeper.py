"""A replica's door: who comes while the model sleeps waits a bounded time, and has it woken."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from cluster.errors import RequestError, RoundhouseError
from serve_apps.engine.interface import Engine

ASK_S = 1.0
"""Between two requests to be woken, while somebody waits."""
FIRST_WAKE_S = 10.0
"""Taken for a waking's time before there was one."""

log = logging.getLogger(__name__)


class Sleeper:
    """``call`` around each request. Whoever obeys orders calls ``sleep``, ``wake`` and ``open``."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        wake_s: float,
        ask: Callable[[], Awaitable[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ask`` has the model woken; it returns what that waits for, if it does."""
        self._name, self._engine, self._wake_s = name, engine, wake_s
        self._ask, self._clock = ask, clock
        self._running, self._idle_since = 0, clock()
        self._door = asyncio.Event()
        self._door.set()
        self._asleep = False
        self._took_s, self._began = FIRST_WAKE_S, clock()
        self._asking: asyncio.Task[None] | None = None
        self._waiting, self._why = 0, ""
        self.wakes, self.waking_s = 0, 0.0
        """Times that it has come back, and the seconds that this took."""

    @property
    def asleep(self) -> bool:
        """Whether there is no engine."""
        return self._asleep

    @property
    def ready(self) -> bool:
        """Whether requests pass: there is an engine, and it has its version."""
        return self._door.is_set()

    @property
    def idle_s(self) -> float:
        """Seconds since the last request ended; 0 while one runs or waits."""
        return 0.0 if self._running or self._waiting else self._clock() - self._idle_since

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Keep the model awake; RequestError (503) when it does not wake within ``wake_s``."""
        if not self._door.is_set():
            await self._wait()
        self._running += 1  # no await since the door was open
        try:
            yield
        finally:
            self._running -= 1
            self._idle_since = self._clock()

    async def sleep(self) -> bool:
        """Close the door and end the engine's processes; False, and nothing, while it is busy."""
        if self._running:
            return False
        self._door.clear()
        await self._engine.stop()
        self._asleep = True  # and not before: what wakes next counts on the memory
        log.info("%s sleeps", self._name)
        return True

    async def wake(self) -> None:
        """Start the engine again; raises what that raises. The door stays shut until `open`."""
        self._began = self._clock()
        await self._engine.start()
        self._asleep = False

    def open(self) -> None:
        """Let requests in."""
        if not self._door.is_set():
            self._took_s, self._idle_since = self._clock() - self._began, self._clock()
            self._door.set()
            self.wakes += 1
            self.waking_s += self._took_s
            log.info("%s is awake after %.1f s", self._name, self._took_s)

    async def _wait(self) -> None:
        self._waiting += 1
        if self._asking is None:
            self._asking = asyncio.create_task(self._keep_asking())
        try:
            async with asyncio.timeout(self._wake_s):
                await self._door.wait()
        except TimeoutError:
            told = f": {self._why}" if self._why else ""
            raise RequestError(
                f"{self._name} was not in memory and did not come back within {self._wake_s:g} s "
                f"(wake_s){told}; try again",
                503,
                "model_asleep",
                "model",
                max(1, math.ceil(self._took_s)),
            ) from None
        finally:
            self._waiting -= 1
            if not self._waiting and self._asking:
                self._asking.cancel()
                self._asking = None

    async def _keep_asking(self) -> None:
        while True:
            try:
                self._why = await self._ask()
            except RoundhouseError as error:
                log.warning("nobody wakes %s: %s", self._name, error)
            await asyncio.sleep(ASK_S)
