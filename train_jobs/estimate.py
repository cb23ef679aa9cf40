"""Memory of one rank before the run. Pure arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset

if TYPE_CHECKING:
    from cluster.library.manifest import Architecture

RUNTIME_BYTES = 700_000_000
LIVE_PARAMETERS = 1_000_000_000
"""Whole parameters that ZeRO 3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""


def of_rank(
    config: FinetuneConfig,
    architecture: Architecture,
    data: Dataset,
    dtype: str,
    trainable: int | None = None,
) -> dict[str, int]:
    """Return bytes by what they are for at the fullest moment of a step; empty if unknown.

    ``trainable`` is how many parameters an adapter adds, None for a full fine-tune.
    """
    return {}
