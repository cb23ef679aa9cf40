"""Knowledge distillation: learn a teacher's distributions token by token, arXiv:2306.13649.

The loss and its options are those of TRL's GKD: no factor for the temperature. The logits of both
models exist for one block of places at a time.

Shapes: K places of a micro-batch, C of them in one block, V entries, k entries a teacher names.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cluster.text.chat import ChatText
from train_jobs.data.encoders.asked import turn_end
from train_jobs.data.example import Document, Example
from train_jobs.objectives.base import Loss
from train_jobs.objectives.decoder import Decoder
from train_jobs.objectives.divergence import divergence, named
from train_jobs.objectives.generate import continued, own_attention, seed_of
from train_jobs.objectives.packed import Packed, pack_documents
from train_jobs.objectives.rollout import answer_document
from train_jobs.objectives.settings import Distillation
from train_jobs.objectives.teacher import Teacher
from train_jobs.outcome import Outcome, mean_loss


@dataclass(frozen=True)
class Lesson:
    """Documents that the student is to be taught on."""

    documents: tuple[Document, ...]
    keys: tuple[str, ...]
    packed: Packed
    told: tuple[torch.Tensor, ...] = ()
    """What the teacher says of each place, ``[K, ...]``."""

    @property
    def weight(self) -> float:
        """K."""
        return self.packed.weight


class Taught(Decoder, ABC):
    """The divergence from a teacher, and a share of the data's own next token."""

    figures: tuple[str, ...] = ("divergence", "nll")

    def __init__(self, settings: Distillation) -> None:
        self.settings = settings

    @abstractmethod
    def taught(self, batches: Sequence[Lesson]) -> list[Lesson]:
        """Return the batches with what the teacher says of them."""

    @abstractmethod
    def compare(
        self, logits_CV: torch.Tensor, targets_C: torch.Tensor, *told: torch.Tensor
    ) -> torch.Tensor:
        """Return ``[C, 3]``: the loss, the divergence, and the next token's own loss."""

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """See :class:`train_jobs.objectives.base.Objective`."""
        self._dtype, self._text = dtype, ChatText.load(base) if self.settings.lmbda else None
        return super().load(base, dtype)

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Lesson:
        """Put the examples' documents one after the other."""
        documents = tuple(document for example in examples for document in example.documents)
        return Lesson(documents, tuple(keys), pack_documents(documents, device))

    def step(self, model: Any, batches: Sequence[Lesson], shares: Sequence[float]) -> list[Lesson]:
        """Have the student answer what it is to answer itself."""
        if not self.settings.lmbda:
            return list(batches)
        with own_attention(model) as module:
            return [self._own_answers(module, batch) for batch in batches]

    def loss(self, model: Any, batch: Lesson) -> Loss:
        """Sum over the batch's targets, in nats."""
        if not batch.told:
            [batch] = self.taught([batch])
        packed = batch.packed
        values = self._head.total(model, packed.inputs, self.compare, packed.targets_K, *batch.told)
        _, apart, nll = values.detach().tolist()
        figures = {"divergence": (apart, batch.weight), "nll": (nll, batch.weight)}
        return Loss(values[0], figures)

    def outcomes(self, model: Any, batch: Lesson, examples: Sequence[Example]) -> list[Outcome]:
        """Return each example's loss and, as what it said, both of its parts."""
        [batch] = self.taught([batch])
        packed = batch.packed
        rows = self._head.rows(model, packed.inputs, self.compare, packed.targets_K, *batch.told)
        losses, apart, nll = (packed.by_document(column).tolist() for column in rows.unbind(1))
        return [
            Outcome(e.where, losses[at], float(e.trained_tokens), said=(apart[at], nll[at]))
            for at, e in enumerate(examples)
        ]

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return loss, divergence, and the next token's loss and perplexity, in nats a token."""
        tokens = sum(outcome.weight for outcome in outcomes)
        nll = sum(outcome.said[1] for outcome in outcomes) / tokens
        return {
            "loss": mean_loss(outcomes),
            "divergence": sum(outcome.said[0] for outcome in outcomes) / tokens,
            "nll": nll,
            "perplexity": math.exp(min(nll, 700.0)),
        }

    def mixed(
        self, apart_C: torch.Tensor, logits_CV: torch.Tensor, targets_C: torch.Tensor
    ) -> torch.Tensor:
        """Return the columns of :meth:`compare`."""
        nll_C = F.cross_entropy(logits_CV, targets_C, reduction="none")
        weight = self.settings.nll
        loss_C = apart_C + weight * nll_C if weight else apart_C
        return torch.stack([loss_C, apart_C, nll_C], dim=1)

    def _own_answers(self, module: Any, batch: Lesson) -> Lesson:
        documents = tuple(
            self._own_answer(module, document, key)
            if random.Random(key).random() < self.settings.lmbda
            else document
            for document, key in zip(batch.documents, batch.keys, strict=True)
        )
        return replace(
            batch,
            documents=documents,
            packed=pack_documents(documents, batch.packed.ids_1T.device),
        )

    def _own_answer(self, module: Any, document: Document, key: str) -> Document:
        assert self._text is not None
        prompt, end = prompt_of(document), turn_end(self._text)
        stops = tuple(dict.fromkeys((*(() if end is None else (end,)), *self._text.eos_ids)))
        [sample] = continued(
            module,
            prompt.ids,
            1,
            self.settings.max_completion_length,
            stops,
            seed_of(key),
            self.settings.temperature,
        )
        return answer_document(prompt, sample, end)


class Distilled(Taught):
    """Learns from a teacher in this process."""

    _teacher: Teacher

    def __init__(self, settings: Distillation, teacher: Path) -> None:
        super().__init__(settings)
        self._directory = teacher

    def prepare(self, model: Any) -> None:
        """Load the teacher beside the engine, whole on every rank."""
        super().prepare(model)
        embedding = model.get_input_embeddings()
        self._teacher = Teacher(self._directory, self._dtype, embedding.weight.device)
        self._entries = min(self._teacher.vocabulary, int(embedding.num_embeddings))

    def taught(self, batches: Sequence[Lesson]) -> list[Lesson]:
        """Run the teacher up to its output layer."""
        return [replace(batch, told=(self._teacher.hidden(batch.packed),)) for batch in batches]

    def compare(
        self, logits_CV: torch.Tensor, targets_C: torch.Tensor, *told: torch.Tensor
    ) -> torch.Tensor:
        """Compare with the teacher's logits, computed here for these places."""
        settings, heat = self.settings, self.settings.temperature
        # models of one family pad the same vocabulary to different sizes; no token lies there
        student_CV = logits_CV[:, : self._entries]
        teacher_CV = self._teacher.logits(told[0])[:, : self._entries]
        student_CV = F.log_softmax(student_CV / heat, dim=1)
        teacher_CV = F.log_softmax(teacher_CV / heat, dim=1)
        if settings.top_k is not None:
            ids_Ck = teacher_CV.topk(min(settings.top_k, self._entries), dim=1).indices
            student_CV, teacher_CV = named(student_CV, ids_Ck), named(teacher_CV, ids_Ck)
        return self.mixed(divergence(student_CV, teacher_CV, settings.beta), logits_CV, targets_C)


def prompt_of(document: Document) -> Document:
    """Return what comes before the last answer of a document, nothing of it trained."""
    last = max(place for place, trained in enumerate(document.trained) if trained)
    start = last
    while start > 1 and document.trained[start - 1]:
        start -= 1
    start = max(start, 1)  # of running text at least the first token is given
    return Document(document.where, document.ids[:start], (False,) * start)
