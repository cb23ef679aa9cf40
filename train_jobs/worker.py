"""The shim that Ray pickles: everything else is imported where it runs."""

from __future__ import annotations

from typing import Any


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Be one rank of the run in ``spec``: ``run`` (its folder), ``revision``, ``resume``."""
    from train_jobs.ray_rank import main

    return main(spec)
