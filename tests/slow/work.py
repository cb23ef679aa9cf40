"""What the ranks run; figures alone come back, a real model's weights stay where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.parity.training_work import Session, digest
from train_jobs.data.dataset import Dataset
from train_jobs.engine import forget
from train_jobs.group import Place


def losses(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """Train and return loss and gradient norm of each step."""
    session = Session(place, base, fields, data)
    session.train()
    told = curve(session)
    forget(session.engine)
    return told


def curve(session: Session) -> dict[str, Any]:
    return {
        "loss": [record["loss"] for record in session.records],
        "norm": [record["grad_norm"] for record in session.records],
    }


def resumed(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path, at: int
) -> dict[str, Any]:
    """Train, saving as configured; then go on from step ``at`` with a fresh engine."""
    session = Session(place, base, fields, data)
    session.train(session.save(folder))
    whole = [curve(session)["loss"][at:], digest(session.whole())]
    forget(session.engine)
    session = Session(place, base, fields, data)
    session.train(since=session.load(folder / f"step-{at:08d}"))
    again = [curve(session)["loss"], digest(session.whole())]
    forget(session.engine)
    return {"whole": whole, "again": again}
