"""What the ranks of the heads' tests run; imported in their processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.parity.training_work import Session, digest
from train_jobs.adapters import inner, merged
from train_jobs.data.dataset import Dataset
from train_jobs.data.order import Order
from train_jobs.data.settle import together
from train_jobs.evaluate import evaluate
from train_jobs.export import write_whole
from train_jobs.group import Place


def session(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> Session:
    """Return a session that deals rows by length, as a run does."""
    made = Session(place, base, fields, data)
    run = made.config.run
    made.order = Order(
        len(data.rows), made.config.batch.total, run.seed, run.epochs, run.steps, data.row_lengths
    )
    return made


def measured(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, heldout: Dataset
) -> dict[str, Any]:
    """Train; return the curve, the figures of the held-out rows, and what was added."""
    run = session(place, base, fields, data)
    added = getattr(inner(run.engine.module), "added_parameters", ())
    start = digest(run.whole())
    run.train()
    world = run.world
    figures = evaluate(run.engine, run.objective, together(heldout), world)
    return run.outcome() | {"figures": figures, "added": added, "start": start}


def exported(
    place: Place,
    base: Path,
    fields: dict[str, Any],
    data: Dataset,
    target: Path,
    inputs: dict[str, Any],
    dtype: str = "float32",
) -> dict[str, Any]:
    """Train, write the model whole, and return what the live one computes."""
    run = session(place, base, fields, data)
    run.train()
    run.engine.eval()
    with torch.no_grad():
        told = run.engine(**{name: torch.tensor(rows) for name, rows in inputs.items()})
    outputs = {name: value.numpy() for name, value in told.items() if "logits" in name}
    adapter = run.config.adapter is not None
    record = sorted(name for name, p in run.engine.module.named_parameters() if p.requires_grad)
    model = merged(run.engine.module) if adapter else run.engine.module
    write_whole(model, base, target, dtype, place.rank)
    return {"outputs": outputs, "trained": record}
