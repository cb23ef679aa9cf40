"""Ranks 1 to n-1: they compute what rank 0 planned, and decide nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve_apps.engine.plan import StepPlan
from serve_apps.engine.rank import Rank

if TYPE_CHECKING:
    from serve_apps.engine.kv_cache import KVCache
    from serve_apps.engine.model import LoadedModel


class Follower(Rank):
    """Its loop ends with rank 0's word, or with an error when rank 0 falls silent."""

    def _loop(self) -> None:
        while True:
            message = self._group.receive()
            if message["t"] == "step":
                plan = StepPlan.unpack(message)
                self._steps = plan.number
                self._forward(plan, sampling=False)
            elif message["t"] == "release":
                self._drop(message["version"], message.get("adapter"))
            elif message["t"] == "stop":
                return

    def _cache_made(self, cache: KVCache) -> None:
        """Its blocks are rank 0's to hand out."""

    def _ready(self, model: LoadedModel) -> None:
        """Have nothing more to make: rank 0 samples."""

    def _loaded(self, version: str, model: LoadedModel) -> None:
        """Rank 0 says when it is computed."""

    def _dropped(self, version: str, adapter: str | None = None) -> None:
        """Leave the blocks as they are: rank 0 knows what they hold."""
