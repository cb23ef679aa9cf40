"""Kahneman-Tversky optimisation, arXiv:2402.01306; the names are TRL's.

How far the policy has moved as such, the baseline of the loss, is the mean log-ratio of answers to
the wrong prompts. Which answer goes with which prompt is fixed for the whole run; the mean is over
the whole global batch. So neither the number of ranks nor the micro-batch changes it. (TRL takes
the micro-batches that the ranks have in hand at once.)

Shapes: D answers of a micro-batch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cluster.errors import ConfigError
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.objectives.base import Loss
from train_jobs.objectives.decoder import Decoder
from train_jobs.objectives.packed import Packed, pack_documents
from train_jobs.objectives.reference import (
    NAME,
    Documents,
    Known,
    fingerprint,
    log_probabilities,
    remember,
    value_of,
)
from train_jobs.objectives.settings import KTO
from train_jobs.outcome import Outcome
from train_jobs.ports import World, sum_over_ranks
from train_jobs.runs import RunDir

Answer = Callable[[], Document]
"""Finds the document whose answer is to be taken."""


@dataclass(frozen=True)
class Answers:
    """D answers, and as many to the wrong prompts."""

    packed: Packed
    wrong: Packed
    reference_D: torch.Tensor
    wrong_reference_D: torch.Tensor
    good_D: torch.Tensor
    """1 for what is wanted, 0 for what is not."""
    kl: float = 0.0
    """The baseline; known once the whole step is."""

    @property
    def weight(self) -> float:
        """D."""
        return float(len(self.good_D))


class KahnemanTversky(Decoder):
    """Raises what is wanted above the baseline and lowers the rest below it."""

    figures: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "kl",
    )

    def __init__(self, settings: KTO) -> None:
        self.settings = settings
        self._known: Known = {}
        self._wrong: dict[bytes, Answer] = {}

    def before(
        self, model: Any, data: Dataset, heldout: Dataset | None, run: RunDir, world: World
    ) -> None:
        """Mismatch the answers, and ask the base about both kinds."""
        parts: list[Documents] = []
        for some in (data, heldout):
            if some is not None:
                right = Documents.of(some)
                self._wrong |= mismatched(right)
                parts += [right, Documents(right.count, partial(self._mismatched, right))]
        self._known = remember(self._head, model, parts, run.path / NAME, world)

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Answers:
        """Build both sequences, with what the reference thinks of them."""
        right = [example.documents[0] for example in examples]
        wrong = [self._mismatch(document) for document in right]

        def numbers(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return Answers(
            pack_documents(right, device),
            pack_documents(wrong, device),
            numbers([value_of(self._known, document) for document in right]),
            numbers([value_of(self._known, document) for document in wrong]),
            numbers([float(bool(example.label)) for example in examples]),
        )

    def step(
        self, model: Any, batches: Sequence[Answers], shares: Sequence[float]
    ) -> list[Answers]:
        """Measure the baseline over the global batch; no gradient goes through it."""
        training = model.training
        model.eval()
        moved = [float(self._moved(model, batch).sum()) for batch in batches]
        model.train(training)
        mine = [sum(m * s for m, s in zip(moved, shares, strict=True))]
        mine += [sum(b.weight * s for b, s in zip(batches, shares, strict=True))]
        total, count = sum_over_ranks(mine)
        return [replace(batch, kl=max(0.0, total / count)) for batch in batches]

    def loss(self, model: Any, batch: Answers) -> Loss:
        """Sum over the answers."""
        logps_D = log_probabilities(self._head, model, batch.packed)
        ratios_D = logps_D - batch.reference_D
        losses_D = kto_loss(ratios_D, batch.good_D, batch.kl, self.settings)
        rewards_D, good_D = self.settings.beta * ratios_D.detach(), batch.good_D
        good, bad = float(good_D.sum()), float((1 - good_D).sum())
        logps = logps_D.detach()
        return Loss(
            losses_D.sum(),
            {
                "rewards/chosen": (float((rewards_D * good_D).sum()), good),
                "rewards/rejected": (float((rewards_D * (1 - good_D)).sum()), bad),
                "logps/chosen": (float((logps * good_D).sum()), good),
                "logps/rejected": (float((logps * (1 - good_D)).sum()), bad),
                "kl": (batch.kl * batch.weight, batch.weight),
            },
        )

    def outcomes(self, model: Any, batch: Answers, examples: Sequence[Example]) -> list[Outcome]:
        """Return both log-ratios of each answer; its loss is that of a baseline of 0."""
        ratios_D = log_probabilities(self._head, model, batch.packed) - batch.reference_D
        losses = kto_loss(ratios_D, batch.good_D, 0.0, self.settings).tolist()
        said = zip(ratios_D.tolist(), self._moved(model, batch).tolist(), strict=True)
        return [
            Outcome(example.where, loss, 1.0, said=pair, meant=bool(example.label))
            for example, loss, pair in zip(examples, losses, said, strict=True)
        ]

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return loss, baseline, margin of the mean rewards, and the accuracy.

        That is the chance that a wanted answer's reward is above an unwanted one's; a tie is half
        of one.
        """
        beta = self.settings.beta
        kl = max(0.0, sum(o.said[1] for o in outcomes) / len(outcomes))
        ratios_D = torch.tensor([o.said[0] for o in outcomes], dtype=torch.float64)
        good_D = torch.tensor([float(o.meant) for o in outcomes], dtype=torch.float64)
        loss = float(kto_loss(ratios_D, good_D, kl, self.settings).mean())
        good = sorted(beta * o.said[0] for o in outcomes if o.meant)
        bad = sorted(beta * o.said[0] for o in outcomes if not o.meant)
        figures = {"loss": loss, "kl": kl}
        if good and bad:
            chosen, rejected = sum(good) / len(good), sum(bad) / len(bad)
            figures |= {"accuracy": ranked(good, bad), "margin": chosen - rejected}
        return figures

    def _mismatched(self, right: Documents, number: int) -> list[Document]:
        return [self._mismatch(document) for document in right.row(number)]

    def _mismatch(self, document: Document) -> Document:
        find = self._wrong.get(fingerprint(document))
        prompt, answer = split(document)
        if find is not None:
            answer = split(find())[1]
        trained = (False,) * len(prompt) + (True,) * len(answer)
        return Document(document.where, prompt + answer, trained)

    def _moved(self, model: Any, batch: Answers) -> torch.Tensor:
        with torch.no_grad():
            return log_probabilities(self._head, model, batch.wrong) - batch.wrong_reference_D


def kto_loss(
    ratios_D: torch.Tensor, good_D: torch.Tensor, kl: float, settings: KTO
) -> torch.Tensor:
    """Return the loss of each answer from its log-ratio of policy and reference."""
    above_D = settings.beta * (ratios_D - kl)
    wanted_D = settings.desirable_weight * (1 - torch.sigmoid(above_D))
    unwanted_D = settings.undesirable_weight * (1 - torch.sigmoid(-above_D))
    return good_D * wanted_D + (1 - good_D) * unwanted_D


def mismatched(rows: Documents) -> dict[bytes, Answer]:
    """Return for each document where to find the next one that has another prompt.

    Raises ConfigError where there is no other.
    """
    places = [(n, at) for n in range(rows.count) for at in range(len(rows.row(n)))]

    def document(number: int) -> Document:
        row, at = places[number % len(places)]
        return rows.row(row)[at]

    found: dict[bytes, Answer] = {}
    for number in range(len(places)):
        this = document(number)
        prompt = split(this)[0]
        others = range(number + 1, number + len(places))
        other = next((n for n in others if split(document(n))[0] != prompt), None)
        if other is None:
            raise ConfigError(
                f"{this.where}: kto compares answers with those to other prompts, and all rows "
                "here have the same prompt; add rows with other ones, or use dpo with pairs"
            )
        found[fingerprint(this)] = partial(document, other)
    return found


def split(document: Document) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of prompt and answer."""
    start = document.trained.index(True, 1)
    return document.ids[:start], document.ids[start:]


def ranked(good: Sequence[float], bad: Sequence[float]) -> float:
    """Return the share of pairs of a good and a bad value, both sorted, in which good is higher."""
    below = sum(bisect_left(bad, value) + bisect_right(bad, value) for value in good)
    return below / 2 / (len(good) * len(bad))
