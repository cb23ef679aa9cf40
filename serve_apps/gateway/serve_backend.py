"""The models of a cluster: Serve handles by name, and the Releases actor's word on versions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from cluster.errors import RequestError, RoundhouseError
from serve_apps.calls import Call, Event, Refusal
from serve_apps.config import REPLICA, model_app
from serve_apps.release_policy import Served, Snapshot, resolve

AWAY_S = 0.5

log = logging.getLogger(__name__)


class Snapshots(Protocol):
    """Where to follow releases."""

    async def snapshot(self, have: Snapshot | None = None) -> Snapshot:
        """Return what is live, once it differs from ``have`` or a bounded time has passed."""

    async def keep_within(self, budget: int | None) -> None:
        """Say how many bytes models may take of each node's memory."""

    async def load(self, name: str) -> str:
        """Bring a model into memory; return what that waits for, if it does."""

    async def unload(self, name: str) -> None:
        """Have a model leave memory as soon as it is idle."""


class Nobody:
    """Says that no model is served: for whoever asks by name and version alone."""

    async def snapshot(self, have: Snapshot | None = None) -> Snapshot:
        """See :class:`Snapshots`."""
        return Snapshot({}, settled=True)

    async def keep_within(self, budget: int | None) -> None:
        """See :class:`Snapshots`."""

    async def load(self, name: str) -> str:
        """See :class:`Snapshots`."""
        return ""

    async def unload(self, name: str) -> None:
        """See :class:`Snapshots`."""


class ServeBackend:
    """See :class:`serve_apps.gateway.backend.Backend`. ``follow`` runs as long as the gateway."""

    def __init__(self, releases: Snapshots) -> None:
        self._releases = releases
        self._served: Mapping[str, Served] = {}
        self._handles: dict[str, Any] = {}
        self.expected: tuple[str, ...] | None = None
        """Models that must answer before the gateway is ready; ``None``: not told yet."""
        self.budget: int | None = None
        """Bytes that models may take of each node's memory."""

    def served(self) -> Mapping[str, Served]:
        """Return what the Releases actor said last; its absence changes nothing.

        Less what was undeployed: a replica that was ended hard is missed there seconds later.
        """
        if self.expected is None:
            return self._served
        return {name: one for name, one in self._served.items() if one.model in self.expected}

    def ready(self) -> bool:
        """Say whether every expected model has a replica that answers."""
        return self.expected is not None and all(
            name in self._served and self._served[name].active for name in self.expected
        )

    async def follow(self) -> None:
        """Keep up with the Releases actor, for ever."""
        have: Snapshot | None = None
        while True:
            try:
                if self.expected is not None:
                    await self._releases.keep_within(self.budget)
                have = await self._releases.snapshot(have)
                self._served = have.over(self._served)
            except RoundhouseError as error:
                log.warning("releases: %s", error)
                await asyncio.sleep(AWAY_S)

    async def move(self, name: str, load: bool) -> str:
        """See :class:`serve_apps.gateway.backend.Backend`."""
        try:
            if load:
                return await self._releases.load(name)
            await self._releases.unload(name)
        except RoundhouseError as error:
            log.warning("%s of %s: %s", "load" if load else "unload", name, error)
            raise RequestError(
                "what decides about memory did not answer; try again", 503, "unavailable", None, 2
            ) from None
        return ""

    async def generate(self, name: str, call: Call) -> AsyncGenerator[Event | Refusal, None]:
        """Stream from one replica; closing this ends the request there."""
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        handle = await self._handle(name)
        stream = handle.generate.remote(call)
        try:
            async for event in stream:
                yield event
        except BackPressureError:
            raise RequestError(
                f"too many requests wait for {name}; try again", 429, "engine_full", None, 2
            ) from None
        except DeploymentUnavailableError:
            resolve(name, self.served())  # undeployed while this waited: 404, not 503
            raise RequestError(
                f"{name} failed to start; `roundhouse status` says why",
                503,
                "unavailable",
                None,
                10,
            ) from None
        finally:
            stream.cancel()  # nothing, when it has ended

    async def _handle(self, name: str) -> Any:
        if name not in self._handles:
            from ray import serve

            # it asks the controller and blocks: not on the loop that streams
            handle = await asyncio.to_thread(
                serve.get_deployment_handle, REPLICA, app_name=model_app(name)
            )
            # events are plain tuples: they need none of what cloudpickle adds
            self._handles[name] = handle.options(stream=True, response_serialization="pickle")
        return self._handles[name]
