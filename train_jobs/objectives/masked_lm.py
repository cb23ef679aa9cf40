"""Guess the tokens that were hidden; if asked, also whether a sentence followed the one before.

Shapes: B rows, S tokens of the longest, K hidden tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from train_jobs.data.example import Document, Example
from train_jobs.data.masking import Masking
from train_jobs.objectives.base import Loss
from train_jobs.objectives.head import Head, nll_and_hits
from train_jobs.objectives.padded import Chosen, Padded, Padding, by_owner, load_with_head
from train_jobs.objectives.settings import MaskedLM
from train_jobs.outcome import Outcome, mean_loss


@dataclass(frozen=True)
class Hidden:
    """B texts, K tokens of which are hidden."""

    texts: Padded
    places_K: torch.Tensor
    """Of ``B * S``, row after row."""
    targets_K: torch.Tensor
    owners_K: torch.Tensor
    replaced_B: torch.Tensor
    """1 where a pair's second sentence is not the one that followed; 0 where there is no pair."""

    @property
    def weight(self) -> float:
        """K."""
        return float(len(self.targets_K))


class HiddenTokens:
    """Negative log-likelihood of each hidden token, summed.

    With pairs, each adds the loss of its two classes as often as it has hidden tokens, so that a
    step's loss is still a mean over hidden tokens, however pairs are spread over ranks.
    """

    _padding: Padding
    _masking: Masking
    _chosen: Chosen
    _head: Head

    def __init__(self, settings: MaskedLM) -> None:
        """Take the share, and whether there are pairs."""
        self._settings = settings
        pairs = ("next_sentence_accuracy",) if settings.next_sentence else ()
        self.figures: tuple[str, ...] = ("token_accuracy", *pairs)

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """See :class:`train_jobs.objectives.base.Objective`.

        Raises ConfigError for a model without a mask token.
        """
        from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

        text = ChatText.load(base)
        if (mask_id := text.named_ids.get("mask_token")) is None:
            raise ConfigError(
                "objective: masked_lm: this model names no mask_token; choose a base that was made "
                "for it (BERT, RoBERTa ...), or name one in its tokenizer_config.json"
            )
        self._padding = Padding.of(base)
        special = text.special_ids
        self._masking = Masking(self._settings.share, mask_id, special, text.vocab_size)
        if not self._settings.next_sentence:
            return load_with_head(AutoModelForMaskedLM, base, dtype)
        model = load_with_head(AutoModelForPreTraining, base, dtype)
        if not hasattr(getattr(model, "cls", None), "seq_relationship"):
            raise ConfigError(
                f"objective.next_sentence: transformers has no head for it on a "
                f"{model.config.model_type} model; choose a BERT, or write next_sentence: false"
            )
        return model

    def prepare(self, model: Any) -> None:
        """Have the head see hidden tokens only."""
        self._chosen = Chosen(model.base_model)
        if not self._settings.next_sentence:
            self._head = Head(model)

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str], device: Any = "cpu"
    ) -> Hidden:
        """Hide tokens as the keys say, and pad."""
        hidden = [self._hide(example, key) for example, key in zip(examples, keys, strict=True)]
        texts = self._padding.collate([documents for documents, _, _ in hidden], device)
        longest = texts.ids_BS.shape[1]
        found = [
            (row * longest + at, target, row)
            for row, (_, places, targets) in enumerate(hidden)
            for at, target in zip(places, targets, strict=True)
        ]
        places, targets, owners = torch.tensor(found, dtype=torch.long, device=device).unbind(1)
        wrong = [int(example.label is False) for example in examples]
        replaced = torch.tensor(wrong, dtype=torch.long, device=device)
        return Hidden(texts, places, targets, owners, replaced)

    def _hide(
        self, example: Example, key: str
    ) -> tuple[tuple[Document, ...], list[int], list[int]]:
        ids = [number for document in example.documents for number in document.ids]
        changed, places = self._masking.hide(ids, key)
        documents, start = [], 0
        for document in example.documents:
            end = start + len(document.ids)
            documents.append(replace(document, ids=tuple(changed[start:end])))
            start = end
        return tuple(documents), places, [ids[at] for at in places]

    def loss(self, model: Any, batch: Hidden) -> Loss:
        """Sum over the batch's hidden tokens, in nats."""
        if not self._settings.next_sentence:
            with self._chosen.only(batch.places_K):
                summed = self._head.total(model, batch.texts.inputs, nll_and_hits, batch.targets_K)
            return Loss(summed[0], {"token_accuracy": (float(summed[1]), batch.weight)})
        values_KF, right_B = self._both(model, batch)
        rows = float(len(right_B))
        return Loss(
            values_KF[:, 0].sum(),
            {
                "token_accuracy": (float(values_KF[:, 1].sum()), batch.weight),
                "next_sentence_accuracy": (float(right_B.sum()), rows),
            },
        )

    def outcomes(self, model: Any, batch: Hidden, examples: Sequence[Example]) -> list[Outcome]:
        """Return loss and hits of each text, and what was said of its pair."""
        if self._settings.next_sentence:
            values_KF, right_B = self._both(model, batch)
            said = [bool(right) for right in right_B.tolist()]
        else:
            said = []
            with self._chosen.only(batch.places_K):
                values_KF = self._head.rows(
                    model, batch.texts.inputs, nll_and_hits, batch.targets_K
                )
        losses, hits, counts = (
            by_owner(column_K, batch.owners_K, len(examples))
            for column_K in (values_KF[:, 0], values_KF[:, 1], torch.ones_like(values_KF[:, 0]))
        )
        return [
            Outcome(example.where, losses[at], counts[at], (hits[at], *said[at : at + 1]))
            for at, example in enumerate(examples)
        ]

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return loss in nats, its exponential, and the shares of tokens and pairs guessed right.

        The exponential is a pseudo-perplexity (arXiv:1910.14659), with several tokens hidden at
        once: the same ones each time.
        """
        loss = mean_loss(outcomes)
        hidden = sum(outcome.weight for outcome in outcomes)
        figures = {"loss": loss}
        if self._settings.next_sentence:
            right = sum(outcome.said[1] for outcome in outcomes)
            figures["next_sentence_accuracy"] = right / len(outcomes)
        else:
            figures["pseudo_perplexity"] = math.exp(min(loss, 700.0))
        return figures | {
            "token_accuracy": sum(outcome.said[0] for outcome in outcomes) / hidden,
        }

    def _both(self, model: Any, batch: Hidden) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``values_KF``, the loss of pairs added to their tokens', and which were right."""
        with self._chosen.only(batch.places_K):
            told = model(**batch.texts.inputs)
        values_KF = nll_and_hits(told.prediction_logits[0].float(), batch.targets_K)
        logits_B2 = told.seq_relationship_logits.float()
        pairs_B = F.cross_entropy(logits_B2, batch.replaced_B, reduction="none")
        losses_K = values_KF[:, 0] + pairs_B[batch.owners_K]
        right_B = (logits_B2.argmax(-1) == batch.replaced_B).float()
        return torch.stack([losses_K, values_KF[:, 1]], dim=1), right_B
