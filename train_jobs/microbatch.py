"""The fullest micro-batch of a run, as each objective builds it. Pure: its memory follows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from train_jobs.data.dataset import Dataset, shape_of
from train_jobs.objectives.settings import (
    GRPO,
    Distillation,
    MaskedLM,
    Objective,
    Reward,
    SequenceClassification,
    TokenClassification,
)


@dataclass(frozen=True)
class MicroBatch:
    """What of it decides how much memory a step takes."""

    tokens: int
    """That go through the model at once, padding among them."""
    longest: int
    """Of one text."""
    asked: int = 0
    """Places that get logits over the vocabulary; 0 where the head has none."""
    copies: int = 4
    """Of a block of logits, as peaks of resident memory have shown it: the logits themselves, their
    log-probabilities, and the gradients of both."""
    whole: bool = False
    """Whether all places have their logits at once, not block by block."""
    kept: int = 0
    """Tokens whose keys and values the model keeps at once while it answers by itself."""


def microbatch(
    objective: Objective, data: Dataset, micro: int, max_len: int | None = None
) -> MicroBatch:
    """Return it. Rows of about equal length come together: it holds the longest ones.

    With a ``max_len`` below the data's own: as they would be when cut to that.
    """
    most = sys.maxsize
    if max_len is not None and max_len < data.max_len:
        most = max_len if shape_of(objective, max_len).together else 2 * max_len
    rows = [min(row, most) for row in sorted(data.row_lengths)[-micro:]]
    match objective:
        case SequenceClassification() | TokenClassification() | Reward():
            return MicroBatch(rows[-1] * len(rows), rows[-1])
        case MaskedLM():
            hidden = sum(max(1, round(objective.share * row)) for row in rows)
            tokens, whole = rows[-1] * len(rows), objective.next_sentence
            return MicroBatch(tokens, rows[-1], hidden, whole=whole)
        case Distillation():
            return _taught(objective, rows, _trained(data, micro, most))
        case GRPO():
            return _answers(objective, rows)
        case _ if objective.packed:
            return MicroBatch(sum(rows), rows[-1], _trained(data, micro, most))
        case _:
            return MicroBatch(rows[-1] * len(rows), rows[-1], _trained(data, micro, most))


def _trained(data: Dataset, micro: int, most: int) -> int:
    both = zip(data.row_work, data.row_lengths, strict=True)
    return min(most, max(work - tokens for work, tokens in both)) * min(micro, len(data.rows))


def _taught(objective: Distillation, rows: Sequence[int], trained: int) -> MicroBatch:
    """Both models' logits, and what their divergence is made of; an answer of its own at times."""
    copies = {0.0: 8, 1.0: 9}.get(objective.beta, 16)
    if objective.top_k:
        copies = 6  # what is compared are a few entries of each
    kept = rows[-1] + objective.max_completion_length if objective.lmbda else 0
    return MicroBatch(sum(rows), rows[-1], trained, copies, kept=kept)


def _answers(objective: GRPO, prompts: Sequence[int]) -> MicroBatch:
    """All answers to each prompt, of full length. Answers to one prompt alone share it."""
    count, length = objective.num_generations, objective.max_completion_length
    asked = len(prompts) * count * length
    again = 1 if len(prompts) == 1 else count
    kept = 0 if objective.app else count * (prompts[-1] + length)
    return MicroBatch(sum(prompts) * again + asked, prompts[-1] + length, asked, kept=kept)
