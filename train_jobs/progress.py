"""How far a run has come: what a checkpoint carries, so that a later process goes on counting."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands after its last optimiser step, over all processes that worked on it."""

    step: int = 0
    """Optimiser steps done; the next step of the data order."""
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    """Of the steps alone."""
    loss: float | None = None
    """Of the last step."""
    stopped: bool = False
    """Whether somebody asked for an early end."""


START = Progress()
