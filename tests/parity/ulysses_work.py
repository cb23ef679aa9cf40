"""What ranks that share sequences run; imported in their processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.parity.training_work import Session
from train_jobs.data.dataset import Dataset
from train_jobs.evaluate import evaluate
from train_jobs.group import Place


def curve(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """Train; return the outcome, what was counted, and figures of the same rows."""
    session = Session(place, base, fields, data)
    ended = session.train()
    figures = evaluate(session.engine, session.objective, data, session.world)
    counted = ended.step, ended.tokens, ended.trained_tokens
    return session.outcome() | {"counted": counted, "heldout": figures}


def kept(flat: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    """Stand in for an exchange: every rank keeps what it has."""
    assert sum(sent) == sum(received)
    return flat.clone()


def without_exchange(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset
) -> dict[str, Any]:
    """Train, and leave the exchange out."""
    session = Session(place, base, fields, data)
    with patch("train_jobs.ulysses._exchanged", kept):
        session.train()
    return session.outcome()


def never_exchanging(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> None:
    """Load a model, and leave the exchange out."""
    with patch("train_jobs.ulysses._exchanged", kept):
        Session(place, base, fields, data)
