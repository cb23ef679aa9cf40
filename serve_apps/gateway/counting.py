"""Hands what a gateway counts of releases to whoever conducts them, once a second."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Protocol

from cluster.errors import RoundhouseError
from serve_apps.gateway.traffic import Traffic
from serve_apps.release_counts import Counts

PERIOD_S = 1.0
LEAST_S = 30.0
"""What could not be handed on for so long is of a window that is over."""

log = logging.getLogger(__name__)


class Counter(Protocol):
    """Takes counts."""

    async def count(self, counts: Mapping[str, Mapping[str, Counts]]) -> None:
        """Add them, by release and version."""


async def hand_on(traffic: Traffic, to: Counter) -> None:
    """Hand counts on, for ever; nothing is sent while no release runs."""
    away_s = 0.0
    while True:
        await asyncio.sleep(PERIOD_S)
        if not (counts := traffic.drain()):
            continue
        try:
            await to.count(counts)
            away_s = 0.0
        except RoundhouseError as error:
            log.warning("counts of releases: %s", error)
            away_s += PERIOD_S
            if away_s < LEAST_S:
                traffic.put_back(counts)
