"""The weight shelf of a replica's node, as the replica sees it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Protocol

from cluster.errors import EngineError
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

    async def renew(self, versions: list[str]) -> None:
        """Keep versions for some more time. EngineError names those that are gone."""

    async def leave(self, version: str) -> None:
        """Need it no more."""


class NodeShelf:
    """The agent of this node (`cluster.weights.actors`). No call blocks the loop."""

    def __init__(self, holder: str) -> None:
        self.holder = holder

    async def open(self) -> None:
        """See :class:`Shelf`."""
        from cluster.weights import client

        await asyncio.to_thread(client.renew, self.holder, [])

    async def bring(self, version: str) -> Path:
        """See :class:`Shelf`."""
        from cluster.weights import client

        return await asyncio.to_thread(client.bring, version, self.holder)

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
