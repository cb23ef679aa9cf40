"""The next token: continued pre-training, chat SFT and prompt-completion.

They differ in what is trained, which their encoders decide; the loss is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train_jobs.attention import use_packed_attention
from train_jobs.data.example import Example
from train_jobs.objectives.base import Loss
from train_jobs.objectives.head import Head, nll, nll_and_hits
from train_jobs.objectives.packed import Packed, load_decoder, pack_documents, share_sequences
from train_jobs.outcome import Outcome, mean_loss
from train_jobs.ulysses import Team


class NextToken:
    """Negative log-likelihood of each trained token, summed."""

    figures: tuple[str, ...] = ()
    team: Team | None = None
    """See :class:`train_jobs.objectives.base.Sliced`."""
    _head: Head

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """See :class:`train_jobs.objectives.base.Objective`."""
        return load_decoder(base, dtype)

    def prepare(self, model: Any) -> None:
        """See :class:`train_jobs.objectives.base.Objective`."""
        use_packed_attention(model)
        share_sequences(model, self.team)
        self._head = Head(model)

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Packed:
        """Put the examples' documents one after the other."""
        documents = [document for example in examples for document in example.documents]
        return pack_documents(documents, device).slice_of(self.team)

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
