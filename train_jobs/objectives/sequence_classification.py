"""One class, several classes, or a number for a text or a pair of texts.

Shapes: B rows, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from train_jobs.data.example import Example
from train_jobs.metrics import classes, numbers
from train_jobs.objectives.base import Loss
from train_jobs.objectives.padded import Padded, Padding, load_with_head
from train_jobs.objectives.settings import SequenceClassification
from train_jobs.outcome import Outcome, mean_loss


@dataclass(frozen=True)
class Labelled:
    """B texts and what they are to be called."""

    texts: Padded
    labels: torch.Tensor
    """``[B]`` numbers of classes; ``[B, L]`` zeros and ones; ``[B]`` numbers."""

    @property
    def weight(self) -> float:
        """B."""
        return float(len(self.labels))


class SequenceClassifier:
    """Cross-entropy, binary cross-entropy over the labels, or squared error; summed over rows."""

    _padding: Padding

    def __init__(self, settings: SequenceClassification) -> None:
        """Take the settings, which must name the labels, but for a regression."""
        self._problem = settings.problem
        self._labels = settings.labels or ("value",)
        assert settings.labels or self._problem == "regression", "the task settles the labels"
        self._numbers = {label: number for number, label in enumerate(self._labels)}
        self.figures: tuple[str, ...] = ("accuracy",) if self._problem == "single_label" else ()

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """See :class:`train_jobs.objectives.base.Objective`."""
        from transformers import AutoModelForSequenceClassification

        self._padding = Padding.of(base)
        model = load_with_head(
            AutoModelForSequenceClassification,
            base,
            dtype,
            id2label=dict(enumerate(self._labels)),
            label2id=self._numbers,
            problem_type={
                "single_label": "single_label_classification",
                "multi_label": "multi_label_classification",
                "regression": "regression",
            }[self._problem],
        )
        # a decoder's head looks for the last token that is not padding
        model.config.get_text_config().pad_token_id = self._padding.pad_id
        return model

    def prepare(self, model: Any) -> None:
        """Nothing: the model is asked as it is."""

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Labelled:
        """Pad the texts, and number their labels."""
        texts = self._padding.collate([example.documents for example in examples], device)
        match self._problem:
            case "single_label":
                named = [self._numbers[example.label] for example in examples]
                labels = torch.tensor(named, dtype=torch.long, device=device)
            case "multi_label":
                labels = torch.zeros(len(examples), len(self._labels), device=device)
                for row, example in enumerate(examples):
                    labels[row, [self._numbers[label] for label in example.label]] = 1.0
            case "regression":
                values = [example.label for example in examples]
                labels = torch.tensor(values, dtype=torch.float32, device=device)
        return Labelled(texts, labels)

    def loss(self, model: Any, batch: Labelled) -> Loss:
        """Sum over the batch's rows; a row of several labels counts their mean."""
        logits_BL = self._logits(model, batch)
        total = self._losses(logits_BL, batch.labels).sum()
        if not self.figures:
            return Loss(total)
        right = (logits_BL.argmax(-1) == batch.labels).sum()
        return Loss(total, {"accuracy": (float(right), batch.weight)})

    def outcomes(self, model: Any, batch: Labelled, examples: Sequence[Example]) -> list[Outcome]:
        """Return what each row was called: a label and how sure, several labels, or a number."""
        logits_BL = self._logits(model, batch)
        losses = self._losses(logits_BL, batch.labels).tolist()
        several = self._problem == "multi_label"
        meant = [tuple(e.label) if several else e.label for e in examples]
        return [
            Outcome(example.where, losses[row], 1.0, self._said(logits_BL[row]), meant[row])
            for row, example in enumerate(examples)
        ]

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return loss and the figures of the problem: see `train_jobs.metrics`."""
        said = [outcome.said for outcome in outcomes]
        meant = [outcome.meant for outcome in outcomes]
        figures = {"loss": mean_loss(outcomes)}
        match self._problem:
            case "single_label":
                named = [label for label, _ in said]
                right = [s == m for s, m in zip(named, meant, strict=True)]
                return figures | {
                    "accuracy": classes.accuracy(named, meant),
                    "f1_macro": classes.f1(named, meant, "macro"),
                    "matthews": classes.matthews(named, meant),
                    "calibration_error": classes.expected_calibration_error(
                        [sure for _, sure in said], right
                    ),
                }
            case "multi_label":
                return figures | {
                    "exact_match": classes.accuracy(said, meant),
                    "f1_micro": classes.f1_of_sets(said, meant, "micro"),
                    "f1_macro": classes.f1_of_sets(said, meant, "macro"),
                }
            case "regression":
                return figures | {
                    "mse": numbers.mean_squared_error(said, meant),
                    "pearson": numbers.pearson(said, meant),
                    "spearman": numbers.spearman(said, meant),
                }

    def _logits(self, model: Any, batch: Labelled) -> torch.Tensor:
        logits: torch.Tensor = model(**batch.texts.inputs).logits
        return logits.float()

    def _losses(self, logits_BL: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        match self._problem:
            case "single_label":
                return F.cross_entropy(logits_BL, labels, reduction="none")
            case "multi_label":
                each = F.binary_cross_entropy_with_logits(logits_BL, labels, reduction="none")
                return each.mean(-1)
            case "regression":
                return F.mse_loss(logits_BL[:, 0], labels, reduction="none")

    def _said(self, logits_L: torch.Tensor) -> Any:
        match self._problem:
            case "single_label":
                sure, number = logits_L.softmax(-1).max(-1)
                return self._labels[int(number)], float(sure)
            case "multi_label":
                chosen = (logits_L > 0).nonzero()[:, 0].tolist()
                return tuple(sorted(self._labels[number] for number in chosen))
            case "regression":
                return float(logits_L[0])
