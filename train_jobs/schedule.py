"""The learning rate as a pure function of the optimiser step."""

from __future__ import annotations

import math

from train_jobs.config import Optim


def lr_at(step: int, steps: int, optim: Optim) -> float:
    """Return the rate that optimiser step ``step`` (from 0) of ``steps`` uses.

    Linear warm-up over ``warmup_ratio`` of the steps, never starting at zero, then half a cosine
    down to ``min_lr_ratio`` of the peak, which the last step reaches (SGDR, arXiv:1608.03983,
    without restarts).
    """
    warmup = round(optim.warmup_ratio * steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    floor = optim.lr * optim.min_lr_ratio
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (optim.lr - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
