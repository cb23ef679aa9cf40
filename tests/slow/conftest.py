"""Fixtures of the tier: the real model, and ranks that may take minutes.

They are new for each test: gigabytes that one leaves behind would be missing in the next.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parity.engine_fixtures import imported, smollm2
from tests.parity.training_fixtures import Ranks

__all__ = ["imported", "smollm2"]
ANSWER_S = 1200.0


@pytest.fixture
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, ANSWER_S)
    yield ranks
    ranks.close()
