"""What every figure asks of its input."""

from __future__ import annotations

from collections.abc import Sized


def paired(said: Sized, meant: Sized) -> None:
    """Raise ValueError unless there is something, and as much on both sides."""
    if len(said) != len(meant):
        raise ValueError(f"{len(said)} predictions for {len(meant)} references; give one for each")
    if not len(meant):
        raise ValueError("no predictions: there is nothing to measure")
