"""Held-out loss: the mean negative log-likelihood of a trained token, before and after a run."""

from __future__ import annotations

from typing import Any

from train_jobs.data.dataset import Dataset
from train_jobs.objectives.sft import collate, nll_sum
from train_jobs.ports import World, sum_over_ranks


def heldout_loss(engine: Any, data: Dataset, world: World) -> float:
    """Return the token mean over all rows of ``data``, in nats; every rank calls it.

    Parameters, gradients and random state stay as they are; no logits are kept. Every rank runs
    equally many passes, because under ZeRO 3 a pass gathers parameters from all of them.
    """
    import torch

    training = engine.module.training
    engine.eval()
    nll = 0.0
    with torch.no_grad():
        for first in range(0, len(data.rows), world.size):
            row = data.rows[first + world.rank : first + world.rank + 1]
            nll += float(nll_sum(engine, collate(row[0] if row else (), engine.device)))
    engine.train(training)
    total, tokens = sum_over_ranks([nll, float(data.trained_tokens) if world.rank == 0 else 0.0])
    return total / tokens
