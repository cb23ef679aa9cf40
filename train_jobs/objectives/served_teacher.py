"""A teacher that the cluster serves: it names its likeliest tokens at each place, no logits.

Shapes: K places of a micro-batch, C of them in one block, k tokens that the teacher names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from cluster.errors import JobError, RoundhouseError
from cluster.generation import Answered, Ask, Sampler
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document
from train_jobs.objectives.distillation import Lesson, Taught
from train_jobs.objectives.divergence import divergence, named, with_rest
from train_jobs.objectives.settings import Distillation
from train_jobs.ports import World
from train_jobs.runs import RunDir

NAME = "teacher.json"
"""In the run's folder: which version answered when the run began."""
PROBE = Ask(prompt_ids=(0, 0), max_tokens=0, top=1)


class ServedDistilled(Taught):
    """Learns from the most likely tokens of a served model; all others count as one."""

    def __init__(self, settings: Distillation, sampler: Sampler) -> None:
        super().__init__(settings)
        self._sampler, self._version = sampler, ""

    @property
    def others(self) -> Mapping[str, str]:
        """The teacher, as its answers name it."""
        return {"teacher": self._version} if self._version else {}

    def before(
        self, model: Any, data: Dataset, heldout: Dataset | None, run: RunDir, world: World
    ) -> None:
        """Note which version answers: a run learns from one teacher, also when it is resumed."""
        told: list[tuple[str, str]] = [("", "")]
        if world.rank == 0:
            path = run.path / NAME
            try:
                now = self._sampler.ask([PROBE])[0].version
                if not path.exists():
                    staged = path.with_suffix(".staged")
                    staged.write_text(json.dumps({"version": now}) + "\n")
                    os.replace(staged, path)
                told = [(str(json.loads(path.read_text())["version"]), "")]
            except (RoundhouseError, OSError) as error:  # the other ranks wait to be told
                told = [("", str(error))]
        dist.broadcast_object_list(told)
        self._version, problem = told[0]
        if problem:
            raise JobError(f"objective.teacher: {self.settings.teacher}: {problem}")

    def step(self, model: Any, batches: Sequence[Lesson], shares: Sequence[float]) -> list[Lesson]:
        """Ask the teacher about a whole step at once."""
        return self.taught(super().step(model, batches, shares))

    def taught(self, batches: Sequence[Lesson]) -> list[Lesson]:
        """Ask about all documents at once."""
        k = self.settings.top_k or 1
        asks = [Ask(d.ids, max_tokens=0, top=k) for batch in batches for d in batch.documents]
        found = self._sampler.ask(asks)
        for answer in found:
            self._check(answer)
        answers = iter(found)
        return [self._told(batch, [next(answers) for _ in batch.documents]) for batch in batches]

    def compare(
        self, logits_CV: torch.Tensor, targets_C: torch.Tensor, *told: torch.Tensor
    ) -> torch.Tensor:
        """Compare the tokens that the teacher names, and the rest."""
        ids_Ck, logps_Ck = told
        student = named(F.log_softmax(logits_CV, dim=1), ids_Ck)
        apart_C = divergence(student, with_rest(logps_Ck), self.settings.beta)
        return self.mixed(apart_C, logits_CV, targets_C)

    def _check(self, answer: Answered) -> None:
        if self._version and answer.version != self._version:
            raise JobError(
                f"{self.settings.teacher} now answers as {answer.version}, and this run has begun "
                f"to learn from {self._version}; move its alias back with `roundhouse promote "
                f"{self._version}` and resume the run, or start a new one"
            )

    def _told(self, batch: Lesson, answers: Sequence[Answered]) -> Lesson:
        device, k = batch.packed.ids_1T.device, self.settings.top_k
        likely = [
            place
            for document, answer in zip(batch.documents, answers, strict=True)
            for place in said_of(document, answer)
        ]
        if any(len(place) != k for place in likely):
            raise JobError(
                f"{self.settings.teacher} did not name {k} likely tokens at each place; set "
                "objective.top_k to what it names, or take the teacher from the library"
            )
        ids = torch.tensor([[token for token, _ in place] for place in likely], device=device)
        logps = torch.tensor([[value for _, value in place] for place in likely], device=device)
        return replace(batch, told=(ids, logps))


def said_of(document: Document, answer: Answered) -> list[tuple[tuple[int, float], ...]]:
    """Return what a teacher said in the place of each trained token."""
    if len(answer.prompt) != len(document.ids) - 1:
        raise JobError(
            f"{document.where}: the teacher answered for {len(answer.prompt)} places of "
            f"{len(document.ids) - 1}"
        )
    return [answer.prompt[at - 1] for at in range(1, len(document.ids)) if document.trained[at]]
