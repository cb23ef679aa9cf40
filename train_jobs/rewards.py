"""Reward functions for GRPO that need nothing but the rows; see docs/objectives/grpo.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def exact(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """Return 1 for a completion that is its row's ``answer``, space around it aside, else 0."""
    return [float(c.strip() == a.strip()) for c, a in zip(completions, answer, strict=True)]


def contains(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """Return 1 for a completion in which its row's ``answer`` stands, else 0."""
    return [float(a.strip() in c) for c, a in zip(completions, answer, strict=True)]
