"""From a config to an engine, importing only the one that was chosen."""

from __future__ import annotations

from serve_apps.config import EngineConfig, Fake
from serve_apps.engine.interface import Engine


def open_engine(config: EngineConfig) -> Engine:
    """Return the engine that ``config`` describes, not started yet."""
    if isinstance(config, Fake):
        from serve_apps.engine.fake import FakeEngine

        return FakeEngine(config)
    from serve_apps.engine.sharded import ShardedEngine

    return ShardedEngine(config)
