"""The weight shelf of a replica's node, as the replica sees it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Protocol

from cluster.errors import EngineError
from cluster.library.ref import Update
from serve_apps.engine.lora_files import CONFIG


class Shelf(Protocol):
    """Where versions lie whose weights travel in memory."""

    holder: str
    """Who uses what is brought."""

    async def open(self) -> None:
        """Have the shelf of this node ready before anything lies there."""

    async def bring(self, version: str) -> Path:
        """Bring a version to this node and keep it for ``holder``.

        Returns a folder with the files that are no weights. UnknownModel where no node has it.
        """

    def update_of(self, version: str) -> Update | None:
        """Return what its run wants of running requests when it goes live, if it said so."""

    async def renew(self, versions: list[str]) -> None:
        """Keep versions for some more time. EngineError names those that are gone."""

    async def leave(self, version: str) -> None:
        """Need it no more."""


class NodeShelf:
    """The agent of this node (`cluster.weights.actors`). No call blocks the loop."""

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self._updates: dict[str, Update] = {}  # of the few that say something

    async def open(self) -> None:
        """See :class:`Shelf`."""
        from cluster.weights import client

        await asyncio.to_thread(client.renew, self.holder, [])

    async def bring(self, version: str) -> Path:
        """See :class:`Shelf`."""
        from cluster.weights import client

        bundle = await asyncio.to_thread(client.take, version, self.holder)
        if bundle.update:
            self._updates[version] = bundle.update
        return await asyncio.to_thread(client.materialised, bundle.files)

    def update_of(self, version: str) -> Update | None:
        """See :class:`Shelf`."""
        return self._updates.get(version)

    async def renew(self, versions: list[str]) -> None:
        """See :class:`Shelf`."""
        from cluster.weights import client

        if gone := await asyncio.to_thread(client.renew, self.holder, versions):
            raise EngineError(f"{', '.join(gone)} lost its place on this node's shelf")

    async def leave(self, version: str) -> None:
        """See :class:`Shelf`."""
        from cluster.weights import client

        await asyncio.to_thread(client.leave, self.holder, version)


def read_base(folder: Path) -> str | None:
    """Return the version that an adapter from the shelf adds to; None for a whole model.

    EngineError where its configuration does not say it.
    """
    try:
        return str(json.loads((folder / CONFIG).read_bytes())["base_model_name_or_path"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{CONFIG} names no base_model_name_or_path ({error!r}); publish it with that of "
            "its base, as in my-model@3"
        ) from None
