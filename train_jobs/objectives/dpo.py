"""Direct preference optimisation, arXiv:2305.18290; the names are TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Example
from train_jobs.objectives.preference import Judgement, PairObjective, Pairs, Seen
from train_jobs.objectives.reference import NAME, Documents, Known, remember, value_of
from train_jobs.objectives.settings import DPO
from train_jobs.ports import World
from train_jobs.runs import RunDir


class DirectPreference(PairObjective):
    """Raises the chosen answer over the rejected one, measured against the base."""

    def __init__(self, settings: DPO) -> None:
        self.settings = settings
        self._known: Known = {}

    def before(
        self, model: Any, data: Dataset, heldout: Dataset | None, run: RunDir, world: World
    ) -> None:
        """Ask the base about every answer."""
        parts = [Documents.of(some) for some in (data, heldout) if some is not None]
        self._known = remember(self._head, model, parts, run.path / NAME, world, self.team)

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Pairs:
        """Add the reference's log-probabilities."""
        pairs = super().collate(examples, keys, device)
        known = [[value_of(self._known, d) for d in example.documents] for example in examples]
        return Pairs(pairs.packed, torch.tensor(known, dtype=torch.float32, device=device))

    def judge(self, seen: Seen) -> Judgement:
        """Compare policy and reference; IPO compares their means per token."""
        assert seen.reference_P2 is not None
        ratios_P2 = seen.logps_P2 - seen.reference_P2
        if self.settings.loss_type == "ipo":
            ratios_P2 = ratios_P2 / seen.tokens_P2
        rewards_P2 = self.settings.beta * ratios_P2.detach()
        return Judgement(dpo_loss(ratios_P2[:, 0] - ratios_P2[:, 1], self.settings), rewards_P2)


def dpo_loss(logits_P: torch.Tensor, settings: DPO) -> torch.Tensor:
    """Return the loss of each pair from how much further the policy prefers the chosen answer.

    ``logits_P`` are log-ratios of policy and reference, chosen minus rejected.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    match settings.loss_type:
        case "sigmoid":
            right, wrong = F.logsigmoid(beta * logits_P), F.logsigmoid(-beta * logits_P)
            return -right * (1 - smoothing) - wrong * smoothing
        case "hinge":
            return torch.relu(1 - beta * logits_P)
        case "ipo":
            return (logits_P - 1 / (2 * beta)) ** 2
