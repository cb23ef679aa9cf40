"""Many processes on one library, killed at random points: the ten seconds of it."""

from __future__ import annotations

from pathlib import Path

from tests.unit.library_storm import storm


def test_t34_readers_see_old_or_new_whatever_is_killed(tmp_path: Path) -> None:
    done = storm(tmp_path, seconds=8, seed=34)
    assert done["killed"] >= 8
    assert min(done[kind] for kind in ("published", "saw")) > 0  # a busy machine does few of each
