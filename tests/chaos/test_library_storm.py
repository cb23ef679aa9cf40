"""Many processes on one library, killed at random points: the minute of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.unit.library_storm import storm

pytestmark = pytest.mark.chaos


def test_t34_readers_see_old_or_new_for_a_minute(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    done = storm(tmp_path, seconds=60, seed=seed)
    assert done["killed"] >= 60
    assert min(done[kind] for kind in ("published", "moved", "removed", "saw")) > 0
