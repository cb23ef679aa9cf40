"""Translation and summarisation: an encoder reads the source, a decoder says the target.

Shapes: B rows, S tokens of the longest source, T of the longest target, K tokens of all targets,
V entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cluster.text.chat import ChatText
from train_jobs.adapters import inner
from train_jobs.data.example import Example
from train_jobs.metrics import texts
from train_jobs.metrics.sums import Sums
from train_jobs.objectives.base import Loss
from train_jobs.objectives.head import Head
from train_jobs.objectives.padded import Chosen, Padded, Padding, by_owner, load_with_head, padded
from train_jobs.objectives.settings import Seq2Seq
from train_jobs.outcome import Outcome


@dataclass(frozen=True)
class Paired:
    """B sources, and the K tokens that their targets are made of."""

    sources: Padded
    given_BT: torch.Tensor
    """What the decoder reads: the start token, then each target without its last token."""
    places_K: torch.Tensor
    """Of ``B * T``, row after row: where the decoder predicts a token."""
    targets_K: torch.Tensor
    owners_K: torch.Tensor

    @property
    def weight(self) -> float:
        """K."""
        return float(len(self.targets_K))

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with.

        Padding of a target needs no mask: it comes last, and nobody asks what is predicted there.
        """
        return {
            **self.sources.inputs,
            "decoder_input_ids": self.given_BT,
            "use_cache": False,
        }


class Translation:
    """Negative log-likelihood of each token of the target, summed."""

    figures: tuple[str, ...] = ("token_accuracy",)
    _padding: Padding
    _text: ChatText
    _chosen: Chosen
    _head: Head

    def __init__(self, settings: Seq2Seq) -> None:
        """Take smoothing, beams and the longest target."""
        self._settings = settings

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """See :class:`train_jobs.objectives.base.Objective`."""
        from transformers import AutoModelForSeq2SeqLM

        self._padding, self._text = Padding.of(base), ChatText.load(base)
        return load_with_head(AutoModelForSeq2SeqLM, base, dtype)

    def prepare(self, model: Any) -> None:
        """Have the head see the places that predict a token only."""
        self._chosen = Chosen(model.get_decoder())
        self._head = Head(model)

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Paired:
        """Pad the sources, and shift the targets by one."""
        sources = self._padding.collate([example.documents[:1] for example in examples], device)
        targets = [example.documents[1].ids for example in examples]
        given = padded([ids[:-1] for ids in targets], self._padding.pad_id, device)
        longest = given.shape[1]
        found = [
            (row * longest + at, target, row)
            for row, ids in enumerate(targets)
            for at, target in enumerate(ids[1:])
        ]
        places, wanted, owners = torch.tensor(found, dtype=torch.long, device=device).unbind(1)
        return Paired(sources, given, places, wanted, owners)

    def loss(self, model: Any, batch: Paired) -> Loss:
        """Sum over the batch's target tokens, in nats; smoothed if the configuration says so."""
        with self._chosen.only(batch.places_K):
            summed = self._head.total(model, batch.inputs, self._smooth, batch.targets_K)
        return Loss(summed[0], {"token_accuracy": (float(summed[1]), batch.weight)})

    def outcomes(self, model: Any, batch: Paired, examples: Sequence[Example]) -> list[Outcome]:
        """Return each target's loss, and what the model says by itself, without a target."""
        with self._chosen.only(batch.places_K):
            values_KF = self._head.rows(model, batch.inputs, _plain, batch.targets_K)
        losses = by_owner(values_KF[:, 0], batch.owners_K, len(examples))
        said = self._generate(model, batch)
        return [
            Outcome(example.where, losses[row], _length(example), said[row], example.label)
            for row, example in enumerate(examples)
        ]

    @property
    def score(self) -> Sums[Outcome]:
        """Loss and perplexity of the targets, and how near what was generated came.

        ``bleu`` and ``chrf`` are 0 to 100, ``rouge_l`` and ``exact_match`` 0 to 1.
        """
        return Sums(_counts, _figures)

    def _smooth(self, logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        smoothing = self._settings.label_smoothing
        losses = F.cross_entropy(logits_CV, targets_C, reduction="none", label_smoothing=smoothing)
        return torch.stack([losses, _hits(logits_CV, targets_C)], dim=1)

    def _generate(self, model: Any, batch: Paired) -> list[str]:
        """Return what is generated for each source: the likeliest token each time, or beams."""
        sources = batch.sources
        stage = getattr(model, "zero_optimization_stage", lambda: 0)()
        said = inner(getattr(model, "module", model)).generate(
            input_ids=sources.ids_BS,
            attention_mask=sources.mask_BS,
            max_new_tokens=self._settings.max_target_len,
            num_beams=self._settings.num_beams,
            do_sample=False,
            # ranks of ZeRO 3 gather parameters together, so all go on until the last has ended
            synced_gpus=stage == 3,
        )
        return [self._text.decode(ids) for ids in said.tolist()]


def _plain(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(logits_CV, targets_C, reduction="none")
    return torch.stack([losses, _hits(logits_CV, targets_C)], dim=1)


def _hits(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    return (logits_CV.argmax(-1) == targets_C).to(logits_CV.dtype)


def _length(example: Example) -> float:
    return float(len(example.documents[1].ids) - 1)


def _counts(outcome: Outcome) -> list[float]:
    return [outcome.loss, outcome.weight, *texts.counts(outcome.said, outcome.meant)]


def _figures(sums: Sequence[float]) -> dict[str, float]:
    total, weight, *rest = sums
    loss = total / weight if weight else float("nan")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **texts.figures(rest)}
