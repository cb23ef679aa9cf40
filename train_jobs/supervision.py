"""What ``run:`` may say of how a run is watched, measured and ended. Pure."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from cluster.config import Frozen


class Diverge(Frozen):
    """Ends a run whose loss runs away, after ``steps`` such steps on end.

    A step is one too many when its loss is above ``times`` the median of the last ``window`` good
    ones, a median below 0.5 counting as 0.5, so that small losses may jump.
    """

    times: float = Field(3.0, gt=1)
    steps: PositiveInt = 20
    window: PositiveInt = 50


class Best(Frozen):
    """Keeps the checkpoints with the best held-out figure, beside the newest ones."""

    metric: str = "loss"
    """A figure of the held-out rows: loss, perplexity, accuracy, whatever the objective gives."""
    mode: Literal["min", "max"] = "min"
    keep: PositiveInt = 1


class EarlyStop(Frozen):
    """Ends a run whose held-out figure no longer gets better; what it has is published."""

    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    patience: PositiveInt = 3
    """Evaluations on end without a better figure."""
    min_delta: NonNegativeFloat = 0.0
    """A figure must be better by more than this to count."""


def read_workers(fields: Any) -> Any:
    """Turn ``workers: {min: 1, max: 4}`` into ``workers: 4, min_workers: 1``."""
    told = fields.get("workers") if isinstance(fields, dict) else None
    if not isinstance(told, dict):
        return fields
    if set(told) != {"min", "max"}:
        raise ValueError(f"workers: give a number, or {{min: 1, max: 2}}, not {told}")
    return {**fields, "workers": told["max"], "min_workers": told["min"]}


def check_batch(total: int, micro: int, least: int, most: int, slices: int = 1) -> None:
    """Refuse a batch that does not divide for every number of ranks; says which would.

    ``slices`` ranks share a row; then their number is one, and a multiple of that.
    """
    wrong = [n for n in range(least, most + 1) if total * slices % (micro * n)]
    if not wrong:
        return
    if least == most:
        share = micro * most // slices
        below = total // share * share
        fits = " or ".join(str(n) for n in (below, below + share) if n)
        rule, numbers = "batch.micro * run.workers", f"{micro} * {most}"
        if slices > 1:
            rule, numbers = f"{rule} / sequence_parallel", f"{numbers} / {slices}"
        raise ValueError(
            f"batch.total={total} is not a multiple of {rule} = {numbers} = {share}; use {fits}"
        )
    shared = math.lcm(*(micro * ranks for ranks in range(least, most + 1)))
    fits = ", ".join(str(n) for n in range(least, most + 1) if n not in wrong) or "none"
    raise ValueError(
        f"batch.total={total} must be a multiple of batch.micro={micro} times every number of "
        f"ranks from {least} to {most} (run.workers), and is not for {', '.join(map(str, wrong))}; "
        f"it is for {fits}. Use a multiple of {shared}, or other bounds"
    )
