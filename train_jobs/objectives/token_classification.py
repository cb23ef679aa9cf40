"""A tag for each word of a sentence.

Shapes: B rows, S tokens of the longest, K tokens that carry a tag, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from train_jobs.data.example import Example
from train_jobs.metrics import classes, tags
from train_jobs.objectives.base import Loss
from train_jobs.objectives.padded import Padded, Padding, by_owner, load_with_head
from train_jobs.objectives.settings import TokenClassification
from train_jobs.outcome import Outcome, mean_loss


@dataclass(frozen=True)
class Tagged:
    """B sentences, and the tags of their K first tokens of words."""

    texts: Padded
    places_K: torch.Tensor
    """Of ``B * S``, row after row."""
    labels_K: torch.Tensor
    owners_K: torch.Tensor

    @property
    def weight(self) -> float:
        """K."""
        return float(len(self.labels_K))


class TokenClassifier:
    """Cross-entropy of each word's tag, summed."""

    figures: tuple[str, ...] = ("accuracy",)
    _padding: Padding

    def __init__(self, settings: TokenClassification) -> None:
        """Take the settings, which must name the labels."""
        assert settings.labels, "the task settles the labels"
        self._labels = settings.labels
        self._numbers = {label: number for number, label in enumerate(self._labels)}

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """See :class:`train_jobs.objectives.base.Objective`."""
        from transformers import AutoModelForTokenClassification

        self._padding = Padding.of(base)
        named = {"id2label": dict(enumerate(self._labels)), "label2id": self._numbers}
        return load_with_head(AutoModelForTokenClassification, base, dtype, **named)

    def prepare(self, model: Any) -> None:
        """Nothing: the model is asked as it is."""

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Tagged:
        """Pad the sentences, and number their tags."""
        texts = self._padding.collate([example.documents for example in examples], device)
        longest = texts.ids_BS.shape[1]
        found = [
            (row * longest + at, self._numbers[tag], row)
            for row, example in enumerate(examples)
            for at, tag in enumerate(tags_of(example))
            if tag is not None
        ]
        places, labels, owners = torch.tensor(found, dtype=torch.long, device=device).unbind(1)
        return Tagged(texts, places, labels, owners)

    def loss(self, model: Any, batch: Tagged) -> Loss:
        """Sum over the batch's tagged words."""
        logits_KL = self._logits(model, batch)
        total = F.cross_entropy(logits_KL, batch.labels_K, reduction="sum")
        right = (logits_KL.argmax(-1) == batch.labels_K).sum()
        return Loss(total, {"accuracy": (float(right), batch.weight)})

    def outcomes(self, model: Any, batch: Tagged, examples: Sequence[Example]) -> list[Outcome]:
        """Return the tags of each sentence."""
        logits_KL = self._logits(model, batch)
        losses_K = F.cross_entropy(logits_KL, batch.labels_K, reduction="none")
        losses = by_owner(losses_K, batch.owners_K, len(examples))
        named = iter([self._labels[number] for number in logits_KL.argmax(-1).tolist()])
        made = []
        for row, example in enumerate(examples):
            meant = tuple(tag for tag in tags_of(example) if tag is not None)
            said = tuple(next(named) for _ in meant)
            made.append(Outcome(example.where, losses[row], float(len(meant)), said, meant))
        return made

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return loss, accuracy and F1 of words, and the F1 of entities where tags spell them."""
        said = [tag for outcome in outcomes for tag in outcome.said]
        meant = [tag for outcome in outcomes for tag in outcome.meant]
        figures = {
            "loss": mean_loss(outcomes),
            "accuracy": classes.accuracy(said, meant),
            "f1_macro": classes.f1(said, meant, "macro"),
        }
        if tags.are_chunks(self._labels):
            figures["entity_f1"] = tags.entity_f1(
                [outcome.said for outcome in outcomes], [outcome.meant for outcome in outcomes]
            )
        return figures

    def _logits(self, model: Any, batch: Tagged) -> torch.Tensor:
        logits_BSL: torch.Tensor = model(**batch.texts.inputs).logits
        return logits_BSL.flatten(0, 1)[batch.places_K].float()


def tags_of(example: Example) -> list[str | None]:
    """Return the tag of each token; None where it has none, or a cut has put another there."""
    [document] = example.documents
    pairs = zip(document.trained, example.label, strict=False)
    return [tag if carries else None for carries, tag in pairs]
