"""Which node's shelf has which version, and which version of a run is the newest.

One detached actor holds this. It stores nothing: after its own death it asks the agents again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from cluster.library.ref import Ref
from cluster.weights.layout import Bundle

WATCH_S = 5.0
"""A follower gets an answer at least this often."""


class Directory:
    """All methods run on one event loop and return soon, but ``watch`` (at most ``WATCH_S``)."""

    def __init__(self) -> None:
        self._bundles: dict[str, Bundle] = {}
        self._nodes: dict[str, dict[str, None]] = {}  # in the order in which they came
        self._changed = asyncio.Event()

    async def have(self, nodes: Sequence[str], bundle: Bundle) -> None:
        """Take note that these nodes have a version, each all or a part of it."""
        self._bundles[bundle.ref] = bundle
        self._nodes.setdefault(bundle.ref, {}).update(dict.fromkeys(nodes))
        self._tell()

    async def lost(self, node: str, ref: str) -> None:
        """Take note that a node has it no more."""
        nodes = self._nodes.get(ref, {})
        nodes.pop(node, None)
        if not nodes:
            self._nodes.pop(ref, None)
            self._bundles.pop(ref, None)
            self._tell()

    async def gone(self, node: str) -> None:
        """Forget a node that has left the cluster, or begun anew."""
        for ref in list(self._nodes):
            await self.lost(node, ref)

    async def find(self, ref: str) -> tuple[Bundle, list[str]] | None:
        """Return a version and the nodes that have some of it."""
        bundle = self._bundles.get(ref)
        return None if bundle is None else (bundle, sorted(self._nodes[ref]))

    async def nodes(self, ref: str) -> list[str]:
        """Return the nodes that have some of a version, the first to have it first."""
        return list(self._nodes.get(ref, ()))

    async def refs(self) -> dict[str, list[str]]:
        """Return the nodes of each version."""
        return {ref: sorted(nodes) for ref, nodes in self._nodes.items()}

    async def watch(self, have: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the newest live version of each name, once that differs from ``have``."""
        if self._newest() == have:
            try:
                async with asyncio.timeout(WATCH_S):
                    await self._changed.wait()
            except TimeoutError:
                pass  # to ask is to live: the same answer again
        return self._newest()

    def _newest(self) -> dict[str, str]:
        newest: dict[str, Bundle] = {}
        for bundle in self._bundles.values():
            ref = Ref.parse(bundle.ref)
            if ref.live and bundle.created >= getattr(newest.get(ref.name), "created", 0.0):
                newest[ref.name] = bundle
        return {name: bundle.ref for name, bundle in newest.items()}

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
