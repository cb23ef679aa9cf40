"""Pairs of answers, the better one first: what DPO, ORPO and SimPO have in common.

Shapes: P pairs, 2P documents (chosen, rejected, chosen ...), K trained tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from train_jobs.data.example import Example
from train_jobs.objectives.base import Loss
from train_jobs.objectives.decoder import SlicedDecoder
from train_jobs.objectives.packed import Packed
from train_jobs.objectives.reference import log_probabilities
from train_jobs.outcome import Outcome, mean_loss

FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""As TRL logs them."""


@dataclass(frozen=True)
class Pairs:
    """P pairs in one sequence."""

    packed: Packed
    reference_P2: torch.Tensor | None = None
    """Log-probabilities of the reference, where the objective has one."""

    @property
    def weight(self) -> float:
        """P; of ranks that share them, each counts its part."""
        return self.packed.documents / 2 / self.packed.sharing


@dataclass(frozen=True)
class Seen:
    """Summed log-probabilities of P pairs and how many tokens each sums, ``[P, 2]``."""

    logps_P2: torch.Tensor
    tokens_P2: torch.Tensor
    reference_P2: torch.Tensor | None = None

    @property
    def means_P2(self) -> torch.Tensor:
        """Log-probabilities per token."""
        return self.logps_P2 / self.tokens_P2


@dataclass(frozen=True)
class Judgement:
    """What an objective makes of P pairs."""

    losses_P: torch.Tensor
    rewards_P2: torch.Tensor
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further figures, each ``[P]``."""


class PairObjective(SlicedDecoder, ABC):
    """An objective over pairs; a subclass judges what the model makes of them."""

    figures: tuple[str, ...] = FIGURES

    @abstractmethod
    def judge(self, seen: Seen) -> Judgement:
        """Return losses and rewards."""

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Pairs:
        """Put chosen and rejected answers one after the other."""
        return Pairs(self.pack(examples, device))

    def loss(self, model: Any, batch: Pairs) -> Loss:
        """Sum over the pairs; of ranks that share them, each of which sees all, a part."""
        part = 1 / batch.packed.sharing
        seen = self._see(model, batch)
        judged = self.judge(seen)
        columns = {
            "rewards/chosen": judged.rewards_P2[:, 0],
            "rewards/rejected": judged.rewards_P2[:, 1],
            "rewards/accuracies": preferred(judged.rewards_P2),
            "rewards/margins": judged.rewards_P2[:, 0] - judged.rewards_P2[:, 1],
            "logps/chosen": seen.logps_P2[:, 0],
            "logps/rejected": seen.logps_P2[:, 1],
            **judged.more,
        }
        sums = torch.stack([columns[name].detach().sum() * part for name in self.figures]).tolist()
        figures = {n: (s, batch.weight) for n, s in zip(self.figures, sums, strict=True)}
        return Loss(judged.losses_P.sum() * part, figures)

    def outcomes(self, model: Any, batch: Pairs, examples: Sequence[Example]) -> list[Outcome]:
        """Return the loss of each pair and, as what it said, both rewards."""
        judged = self.judge(self._see(model, batch))
        losses, rewards = judged.losses_P.tolist(), judged.rewards_P2.tolist()
        return [
            Outcome(example.where, loss, 1.0, said=tuple(pair))
            for example, loss, pair in zip(examples, losses, rewards, strict=True)
        ]

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return loss, share of pairs told right (a tie is half of one), and mean margin."""
        pairs = [outcome.said for outcome in outcomes]
        right = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in pairs]
        return {
            "loss": mean_loss(outcomes),
            "accuracy": sum(right) / len(pairs),
            "margin": sum(c - r for c, r in pairs) / len(pairs),
        }

    def _see(self, model: Any, batch: Pairs) -> Seen:
        logps = log_probabilities(self._head, model, batch.packed)
        ones_K = torch.ones_like(batch.packed.targets_K, dtype=logps.dtype)
        tokens = batch.packed.by_document(ones_K).clamp(min=1)  # of an answer that was cut away
        return Seen(logps.view(-1, 2), tokens.view(-1, 2), batch.reference_P2)


def preferred(rewards_P2: torch.Tensor) -> torch.Tensor:
    """Return 1 where the chosen answer has the higher reward, a half where they are equal."""
    return (torch.sign(rewards_P2[:, 0] - rewards_P2[:, 1]) + 1) / 2
