"""Simple preference optimisation, arXiv:2405.14734; the names are TRL's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from train_jobs.objectives.preference import Judgement, PairObjective, Seen
from train_jobs.objectives.settings import SimPO


class SimplePreference(PairObjective):
    """Compares means per token, which are also how answers are generated; no reference."""

    def __init__(self, settings: SimPO) -> None:
        self.settings = settings

    def judge(self, seen: Seen) -> Judgement:
        """Ask for a margin between the rewards."""
        rewards_P2 = self.settings.beta * seen.means_P2
        return Judgement(simpo_loss(rewards_P2, self.settings), rewards_P2.detach())


def simpo_loss(rewards_P2: torch.Tensor, settings: SimPO) -> torch.Tensor:
    """Return the loss of each pair from its rewards."""
    logits_P = rewards_P2[:, 0] - rewards_P2[:, 1] - settings.gamma
    smoothing = settings.label_smoothing
    return -F.logsigmoid(logits_P) * (1 - smoothing) - F.logsigmoid(-logits_P) * smoothing
