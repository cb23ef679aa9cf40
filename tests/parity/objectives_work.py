"""What ranks run for objectives beyond the next token; imported in their processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.parity.training_work import Session
from train_jobs import checkpoint
from train_jobs.data.dataset import Dataset
from train_jobs.evaluate import evaluate
from train_jobs.group import Place
from train_jobs.objectives.base import Ahead
from train_jobs.runs import RunDir


class Begun(Session):
    """A session whose objective has asked the base what it wants to know."""

    def __init__(
        self,
        place: Place,
        base: Path,
        fields: dict[str, Any],
        data: Dataset,
        folder: Path,
        heldout: Dataset | None = None,
    ) -> None:
        teacher = fields["objective"].get("teacher")
        if teacher and not teacher.startswith("serve:"):
            from train_jobs.objectives.distillation import Distilled

            def beside(config: Any) -> Any:
                return Distilled(config.objective, Path(teacher))

            with patch("train_jobs.objectives.open.open_objective", beside):
                super().__init__(place, base, fields, data)
        else:
            super().__init__(place, base, fields, data)
        self.heldout = heldout
        if isinstance(self.objective, Ahead):
            run = RunDir(folder)
            self.objective.before(self.engine, data, heldout, run, self.world)

    def score(self) -> dict[str, float]:
        """Return the figures of what is held out."""
        return evaluate(self.engine, self.objective, self.heldout or self.data, self.world)


def trained(
    place: Place,
    base: Path,
    fields: dict[str, Any],
    data: Dataset,
    folder: Path,
    heldout: Dataset | None = None,
) -> dict[str, Any]:
    """Train; return curve, figures of each step, and what is held out before and after."""
    session = Begun(place, base, fields, data, folder, heldout)
    before = session.score()
    session.train()
    steps = [record for record in session.records if "step" in record]
    return session.outcome() | {"before": before, "after": session.score(), "steps": steps}


def resumed(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path, at: int
) -> dict[str, Any]:
    """Train, saving as configured; then go on from step ``at`` in a fresh engine."""
    whole = Begun(place, base, fields, data, folder)
    stamp = (folder / "reference.safetensors").stat().st_mtime_ns
    whole.train(whole.save(folder / "checkpoints"))
    again = Begun(place, base, fields, data, folder)
    assert (folder / "reference.safetensors").stat().st_mtime_ns == stamp, "it was read again"
    path = folder / "checkpoints" / f"step-{at:08d}"
    assert next(checkpoint.damage(path), None) is None
    again.train(since=again.load(path))
    return {"whole": whole.outcome(), "again": again.outcome()}
