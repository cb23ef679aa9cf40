"""The next token: continued pre-training, chat SFT and prompt-completion.

They differ in what is trained, which their encoders decide; the loss is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from train_jobs.data.example import Example
from train_jobs.objectives.base import Loss
from train_jobs.objectives.decoder import SlicedDecoder
from train_jobs.objectives.head import nll, nll_and_hits
from train_jobs.objectives.packed import Packed
from train_jobs.outcome import Outcome, mean_loss


class NextToken(SlicedDecoder):
    """Negative log-likelihood of each trained token, summed."""

    figures: tuple[str, ...] = ()

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Packed:
        """Put the examples' documents one after the other."""
        return self.pack(examples, device)

    def loss(self, model: Any, batch: Packed) -> Loss:
        """Sum over the batch's targets, in nats."""
        return Loss(self._head.total(model, batch.inputs, nll, batch.targets_K)[0])

    def outcomes(self, model: Any, batch: Packed, examples: Sequence[Example]) -> list[Outcome]:
        """Return loss and hits of each example's tokens."""
        values_KF = self._head.rows(model, batch.inputs, nll_and_hits, batch.targets_K)
        losses = batch.by_document(values_KF[:, 0]).tolist()
        hits = batch.by_document(values_KF[:, 1]).tolist()
        return [
            Outcome(example.where, losses[at], float(example.trained_tokens), said=hits[at])
            for at, example in enumerate(examples)
        ]

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return loss in nats, perplexity, and the share of tokens that were the likeliest."""
        loss = mean_loss(outcomes)
        tokens = sum(outcome.weight for outcome in outcomes)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": sum(float(outcome.said) for outcome in outcomes) / tokens,
        }
