"""Answers to prompts, with what they earned: what a step of GRPO learns from.

Shapes: G answers to each prompt, K trained tokens of all answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cluster.generation import Sample
from train_jobs.data.example import Document, Example
from train_jobs.objectives.packed import Packed, pack_documents


@dataclass(frozen=True)
class Prompts:
    """What a micro-batch is before anything was generated."""

    examples: tuple[Example, ...]
    keys: tuple[str, ...]
    device: Any

    @property
    def weight(self) -> float:
        """Nothing can be learnt from a prompt."""
        return 0.0


@dataclass(frozen=True)
class Rollout:
    """Answers to some prompts, ready to be learnt from."""

    packed: Packed
    sampled_K: torch.Tensor
    """Log-probabilities that the sampler gave; nan where it is the policy itself."""
    advantages_K: torch.Tensor
    shares_K: torch.Tensor
    """What each token's loss counts."""
    weight: float
    """The sum of the shares."""
    figures: Mapping[str, tuple[float, float]]


def group_advantages(rewards: Sequence[float], scaled: bool) -> list[float]:
    """Return how much better than its group each answer was; in standard deviations if ``scaled``.

    As TRL: the sample's standard deviation, and 1e-4 against division by nothing.
    """
    mean = math.fsum(rewards) / len(rewards)
    apart = [reward - mean for reward in rewards]
    if not scaled:
        return apart
    spread = deviation(rewards) + 1e-4
    return [one / spread for one in apart]


def deviation(values: Sequence[float]) -> float:
    """Return the sample's standard deviation."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def answer_document(prompt: Document, sample: Sample, end: int | None) -> Document:
    """Return prompt and answer; the token that ended the answer is trained, too."""
    ids = sample.ids + ((end,) if sample.ended and end is not None else ())
    trained = (False,) * len(prompt.ids) + (True,) * len(ids)
    return Document(prompt.where, prompt.ids + ids, trained)


def sampled_logprobs(sample: Sample, document: Document) -> list[float]:
    """Return one number for each trained token; nan where the sampler named none."""
    count = document.trained_tokens
    found = list(sample.logprobs[:count])
    return found + [math.nan] * (count - len(found))


def build(
    documents: Sequence[Document],
    sampled: Sequence[Sequence[float]],
    advantages: Sequence[float],
    by_token: bool,
    figures: Mapping[str, tuple[float, float]],
    device: Any,
) -> Rollout:
    """Put answers one after the other. ``by_token``: each token counts 1, else each answer."""
    packed = pack_documents(documents, device)
    counts = torch.tensor([d.trained_tokens for d in documents], device=device)
    told = torch.tensor(advantages, dtype=torch.float32, device=device)
    owners_K = packed.owners_K
    shares_K = torch.ones(len(owners_K), device=device)
    if not by_token:
        shares_K = shares_K / counts[owners_K]
    flat = [number for one in sampled for number in one]
    return Rollout(
        packed,
        torch.tensor(flat, dtype=torch.float32, device=device),
        told[owners_K],
        shares_K,
        float(len(owners_K)) if by_token else float(len(documents)),
        figures,
    )
