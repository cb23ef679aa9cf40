"""What ranks run for objectives beyond the next token; imported in their processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from cluster.generation import Answered, Ask, Sample
from cluster.library.manifest import CARD, Facts
from cluster.library.store import Library
from tests.parity.training_work import Session
from train_jobs import checkpoint
from train_jobs.adapters import merged
from train_jobs.data.dataset import Dataset
from train_jobs.evaluate import evaluate
from train_jobs.export import live_tensors
from train_jobs.group import Place
from train_jobs.objectives.base import Ahead
from train_jobs.objectives.settings import GRPO as Config
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
            self.records.clear()  # of steps only from here on

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
    stored = folder / "reference.safetensors"
    stamp = stored.stat().st_mtime_ns if place.rank == 0 else 0  # who wrote it, if anybody
    whole.train(whole.save(folder / "checkpoints"))
    again = Begun(place, base, fields, data, folder)
    assert place.rank or stored.stat().st_mtime_ns == stamp, "it was read, not computed again"
    path = folder / "checkpoints" / f"step-{at:08d}"
    assert next(checkpoint.damage(path), None) is None
    again.train(since=again.load(path))
    return {"whole": whole.outcome(), "again": again.outcome()}


def early_letters(prompts: Any, completions: Any, weight: Any, **columns: Any) -> list[float]:
    """Reward answers for letters from the first half of the alphabet."""
    assert len(prompts) == len(completions) == len(weight)
    shares = [sum(c.lower() < "n" for c in said) / max(1, len(said)) for said in completions]
    return [share * by for share, by in zip(shares, weight, strict=True)]


def refreshed(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, home: Path
) -> dict[str, Any]:
    """Train a policy whose app is a library entry that follows its alias at once."""
    from train_jobs.live import Weights, stored_names
    from train_jobs.objectives.grpo import GroupRelative
    from train_jobs.objectives.refresh import Refresh

    with patch.dict(os.environ, ROUNDHOUSE_HOME=str(home)):
        library = Library()
        start = library.publish("policy", base, Facts())
        answers = Following(library)
        objective = Config.model_validate(fields["objective"])
        refresh = Refresh("policy", start, objective.sync_every, answers)
        made = GroupRelative(objective, answers, refresh)
        with patch("train_jobs.objectives.open.open_objective", lambda config: made):
            session = Session(place, base, fields, data)
        session.train()
        # what the next step would begin with, of a run that has been resumed before it
        Refresh("policy", start, objective.sync_every, answers).step(session.engine)
        now = library.resolve("policy")
        stored = load_file(now.path / "model.safetensors")
        live = Weights(session.engine.module, start.ref, {}, stored_names(start)).all()
        trained = live_tensors(merged(session.engine.module))  # what an export would write
        return {
            "card": (now.path / CARD).read_text(),
            "trained": all(torch.allclose(live[n], trained[n], atol=1e-6) for n in stored),
            "versions": [version.number for version in library.versions("policy")],
            "champion": now.number,
            "said": answers.said,
            "staleness": [one["staleness"] for one in session.records if "staleness" in one],
            "same": all(torch.equal(stored[name], live[name].cpu()) for name in stored),
            "moved": any(
                not torch.equal(stored[name], value)
                for name, value in load_file(base / "model.safetensors").items()
            ),
        }


class Following:
    """A served model that answers with what its alias points to."""

    def __init__(self, library: Library) -> None:
        self.library, self.said = library, list[str]()

    def ask(self, asks: Sequence[Ask]) -> list[Answered]:
        ref = self.library.resolve("policy").ref
        self.said.append(ref)
        samples = [Sample((97 + 8 * k, 120), (-5.5, -5.5), True) for k in range(4)]
        return [Answered(ref, tuple(samples[: ask.n])) for ask in asks]
