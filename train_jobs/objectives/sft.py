"""Supervised fine-tuning on dialogues: negative log-likelihood of the assistant's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from train_jobs.attention import Layout
from train_jobs.data.dataset import Document

MIN_PREFIX = 8
"""A shorter common beginning is not worth the attention masks."""


@dataclass(frozen=True)
class Batch:
    """Documents one after the other as one sequence of T tokens, K of which predict a target.

    What all documents begin with, as a rule the system message, stands there once, in front, and
    each document attends to it. Causal attention makes that exact: no token before the first
    difference can know in which document it is.
    """

    ids_1T: torch.Tensor
    positions_1T: torch.Tensor
    """As if each document stood alone."""
    layout: Layout
    predicts_K: torch.Tensor
    """Where in T the predictions are made: the place before each trained token."""
    targets_K: torch.Tensor


def collate(documents: Sequence[Document], device: Any = "cpu", share: bool = True) -> Batch:
    """Build the batch of one micro-step; no document at all makes one without a target."""
    prefix = common_prefix([document.ids for document in documents]) if share else 0
    ids = list(documents[0].ids[:prefix]) if documents else [0]
    positions = list(range(len(ids)))
    predicts, targets = [], []
    for document in documents:
        shift = len(ids) - prefix  # from a place in the document to a place in T
        for place in range(1, len(document.ids)):
            if document.trained[place]:
                before = place - 1
                predicts.append(before if before < prefix else before + shift)
                targets.append(document.ids[place])
        ids += document.ids[prefix:]
        positions += range(prefix, len(document.ids))
    lengths = tuple(len(document.ids) - prefix for document in documents) or (1,)
    return Batch(
        ids_1T=torch.tensor([ids], device=device),
        positions_1T=torch.tensor([positions], device=device),
        layout=Layout(prefix, lengths),
        predicts_K=torch.tensor(predicts, dtype=torch.long, device=device),
        targets_K=torch.tensor(targets, dtype=torch.long, device=device),
    )


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all sequences begin with, short of any whole one; 0 if too few."""
    if len(sequences) < 2:
        return 0
    longest = min(map(len, sequences)) - 1
    same = (len({s[at] for s in sequences}) == 1 for at in range(longest))
    length = next((at for at, equal in enumerate(same) if not equal), longest)
    return length if length >= MIN_PREFIX else 0


def nll_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Return the summed negative log-likelihood of the batch's targets, a float32 scalar.

    The head runs at the K predicting places only: in a small model with a large vocabulary it is
    much of the work and most of the memory. ``model`` is a transformers causal
    LM, or an engine around one, that uses packed attention.
    """
    logits_1KV = model(
        input_ids=batch.ids_1T,
        position_ids=batch.positions_1T,
        layout=batch.layout,
        logits_to_keep=batch.predicts_K,
        use_cache=False,
    ).logits
    return F.cross_entropy(logits_1KV[0].float(), batch.targets_K, reduction="sum")
