"""A decoder with one output, which gives a whole conversation a number.

Shapes: B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from train_jobs.data.example import Example
from train_jobs.objectives.base import Loss
from train_jobs.objectives.padded import Padded, Padding, load_with_head
from train_jobs.objectives.settings import Reward
from train_jobs.outcome import Outcome, mean_loss


@dataclass(frozen=True)
class Compared:
    """2 B conversations: first all that were chosen, then all that were rejected."""

    texts: Padded

    @property
    def weight(self) -> float:
        """B."""
        return len(self.texts.ids_BS) / 2


class RewardModel:
    """``-log sigmoid(chosen - rejected)``, summed over pairs.

    The model of Bradley and Terry (Biometrika 39, 1952; arXiv:2203.02155, 3.5).
    """

    figures: tuple[str, ...] = ("accuracy", "margin")
    _padding: Padding

    def __init__(self, settings: Reward) -> None:
        """Take the pull towards zero."""
        self._pull = settings.center_rewards_coefficient

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """See :class:`train_jobs.objectives.base.Objective`."""
        from transformers import AutoModelForSequenceClassification

        self._padding = Padding.of(base)
        model = load_with_head(
            AutoModelForSequenceClassification,
            base,
            dtype,
            id2label={0: "reward"},
            label2id={"reward": 0},
            problem_type="regression",
        )
        # transformers reads the reward at the last token that is not this one
        model.config.get_text_config().pad_token_id = self._padding.pad_id
        return model

    def prepare(self, model: Any) -> None:
        """Nothing: the model is asked as it is."""

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Compared:
        """Pad both sides of all pairs together: one pass judges them."""
        sides = [example.documents[side : side + 1] for side in (0, 1) for example in examples]
        return Compared(self._padding.collate(sides, device))

    def loss(self, model: Any, batch: Compared) -> Loss:
        """Sum over the batch's pairs."""
        chosen_B, rejected_B = self._rewards(model, batch)
        margin_B = chosen_B - rejected_B
        return Loss(
            self._losses(chosen_B, rejected_B).sum(),
            {
                "accuracy": (float((margin_B > 0).sum()), batch.weight),
                "margin": (float(margin_B.detach().sum()), batch.weight),
            },
        )

    def outcomes(self, model: Any, batch: Compared, examples: Sequence[Example]) -> list[Outcome]:
        """Return both rewards of each pair."""
        chosen_B, rejected_B = self._rewards(model, batch)
        losses = self._losses(chosen_B, rejected_B).tolist()
        rewards = torch.stack([chosen_B, rejected_B], dim=1).tolist()
        return [
            Outcome(example.where, losses[row], 1.0, tuple(rewards[row]))
            for row, example in enumerate(examples)
        ]

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return loss, the share of pairs in the right order, and means of the rewards."""
        pairs = [outcome.said for outcome in outcomes]
        count = len(pairs)
        return {
            "loss": mean_loss(outcomes),
            "accuracy": sum(chosen > rejected for chosen, rejected in pairs) / count,
            "margin": math.fsum(chosen - rejected for chosen, rejected in pairs) / count,
            "reward_chosen": math.fsum(chosen for chosen, _ in pairs) / count,
            "reward_rejected": math.fsum(rejected for _, rejected in pairs) / count,
        }

    def _rewards(self, model: Any, batch: Compared) -> tuple[torch.Tensor, torch.Tensor]:
        rewards: torch.Tensor = model(**batch.texts.inputs).logits[:, 0].float()
        chosen_B, rejected_B = rewards.chunk(2)
        return chosen_B, rejected_B

    def _losses(self, chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor:
        return -F.logsigmoid(chosen_B - rejected_B) + self._pull * (chosen_B + rejected_B) ** 2
