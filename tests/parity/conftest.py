"""Fixtures of the tier, made once a session whichever module asks first."""

from __future__ import annotations

from tests.parity.engine_fixtures import (
    imported,
    loop,
    smollm2,
    smollm2_reference,
    tiny,
    tiny2,
)

__all__ = ["imported", "loop", "smollm2", "smollm2_reference", "tiny", "tiny2"]
