"""The rim of releases: finding, making and calling the one detached actor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from cluster import logs
from cluster.errors import RoundhouseError
from cluster.session import DETACHED, NAMESPACE
from serve_apps.release_config import Golden
from serve_apps.release_counts import Counts
from serve_apps.release_policy import WATCH_S, Order, Report, Snapshot
from serve_apps.releases import Releases

NAME = "releases"
CALL_S = WATCH_S + 10.0
"""Bound of any call but a promotion."""
REPLACE_S = 20.0

log = logging.getLogger(__name__)


class ClusterReleases(Releases):
    """What Ray runs: releases that follow the cluster's shelf."""

    def __init__(self, revision: str) -> None:
        logs.speak()
        super().__init__(revision=revision, shelf=ClusterShelf(), asker=ClusterAsker())


class ClusterShelf:
    """The shelf's directory; nothing is made before somebody asks for what is live."""

    async def watch(self, have: Mapping[str, str]) -> dict[str, str]:
        """See :class:`serve_apps.releases.Shelf`."""
        import ray

        from cluster.weights.actors import open_directory

        directory = await asyncio.to_thread(open_directory)
        try:
            async with asyncio.timeout(CALL_S):
                newest: dict[str, str] = await directory.watch.remote(dict(have))
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ReleasesAway(f"the shelf's directory did not answer: {error}") from None
        return newest


class ClusterAsker:
    """Asks a model as the gateway does, and a version of it by name."""

    def __init__(self) -> None:
        self._backend: Any = None

    async def ask(self, name: str, version: str, golden: Golden) -> str:
        """See :class:`serve_apps.release_witness.Asker`."""
        from serve_apps.gateway.serve_backend import Nobody, ServeBackend
        from serve_apps.golden import asked

        if self._backend is None:
            self._backend = ServeBackend(Nobody())
        return await asked(self._backend, name, version, golden)


def open_releases(revision: str) -> Any:
    """Return the actor's handle, making the actor where there is none.

    It inherits the code package of the process that makes it.
    """
    import ray

    return (
        ray.remote(ClusterReleases)
        .options(
            name=NAME,
            **DETACHED,
            max_task_retries=0,
            max_concurrency=1000,
        )
        .remote(revision)
    )


async def renew_releases(revision: str) -> Any:
    """Return an actor that runs the code of ``revision``, replacing one that runs another.

    Only the gateway calls this, once in its constructor: its deployment is what changed code
    replaces first, and replicas report again to whatever actor bears the name.
    """
    import ray

    async with asyncio.timeout(REPLACE_S):
        while True:
            actor = open_releases(revision)
            try:
                if await actor.revision.remote() == revision:
                    return actor
                ray.kill(actor)
            except ray.exceptions.RayActorError:
                log.info("the Releases actor is going; waiting for its name")
            await asyncio.sleep(0.1)


def find_releases() -> Any | None:
    """Return the actor's handle, or ``None`` where nothing was deployed yet."""
    import ray

    try:
        return ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return None


class RemoteReleases:
    """The actor, as a follower sees it: each call is bounded, and survives its replacement."""

    def __init__(self, revision: str) -> None:
        self._revision = revision
        self._actor: Any | None = None

    async def watch(
        self, name: str, alias: str, replica: str, report: Report, have: Order | None
    ) -> Order:
        """See :meth:`Releases.watch`."""
        order: Order = await self._call("watch", name, alias, replica, report, have)
        return order

    async def report(self, name: str, alias: str, replica: str, report: Report) -> None:
        """See :meth:`Releases.report`."""
        await self._call("report", name, alias, replica, report)

    async def leave(self, name: str, replica: str) -> None:
        """See :meth:`Releases.leave`."""
        await self._call("leave", name, replica)

    async def snapshot(self, have: Snapshot | None = None) -> Snapshot:
        """See :meth:`Releases.snapshot`."""
        snapshot: Snapshot = await self._call("snapshot", have)
        return snapshot

    async def count(self, counts: Mapping[str, Mapping[str, Counts]]) -> None:
        """See :meth:`Releases.count`."""
        await self._call("count", counts)

    async def wake(self, name: str) -> str:
        """See :meth:`Releases.wake`."""
        why: str = await self._call("wake", name)
        return why

    async def load(self, name: str) -> str:
        """See :meth:`Releases.load`."""
        why: str = await self._call("load", name)
        return why

    async def unload(self, name: str) -> None:
        """See :meth:`Releases.unload`."""
        await self._call("unload", name)

    async def keep_within(self, budget: int | None) -> None:
        """See :meth:`Releases.keep_within`."""
        await self._call("keep_within", budget)

    async def _call(self, method: str, *args: Any) -> Any:
        import ray

        if self._actor is None:
            # looking a name up asks the head and blocks: not on the loop that streams tokens
            self._actor = await asyncio.to_thread(open_releases, self._revision)
        try:
            async with asyncio.timeout(CALL_S):
                return await getattr(self._actor, method).remote(*args)
        except (ray.exceptions.RayActorError, TimeoutError) as error:
            self._actor = None
            raise ReleasesAway(f"the Releases actor did not answer {method}: {error}") from None


class ReleasesAway(RoundhouseError):
    """The actor is being restarted; ask again."""
