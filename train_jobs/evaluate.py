"""What a model makes of held-out rows, before, during and after a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.library.evaluations import Figure
from train_jobs.data.dataset import Dataset
from train_jobs.objectives.base import Objective, reader
from train_jobs.outcome import Outcome
from train_jobs.ports import World


def evaluate(
    engine: Any,
    objective: Objective,
    data: Dataset,
    world: World,
    seed: int = 0,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the objective's figures for all rows of ``data``; every rank calls it and gets them.

    Parameters, gradients and random state stay as they are. ``beat`` is called before each pass.
    """
    return objective.score(outcomes(engine, objective, data, world, seed, beat))


def sureness(
    objective: Objective,
    found: Sequence[Outcome],
    seed: int,
    draws: int = 200,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Figure]:
    """Return the figures of some outcomes with their bootstrap intervals.

    ``beat`` is called before each resample: all of them may take longer than a rank may be silent.
    """
    from train_jobs.metrics.bootstrap import intervals

    told = intervals(found, objective.score, draws, seed=seed, beat=beat) if found else {}
    return {n: Figure(value=one.value, low=one.low, high=one.high) for n, one in told.items()}


def outcomes(
    engine: Any,
    objective: Objective,
    data: Dataset,
    world: World,
    seed: int = 0,
    beat: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Return every example's outcome, in the order of the data, on every rank.

    Every rank runs equally many passes, because under ZeRO 3 a pass gathers parameters from all
    of them; a rank without a row runs the first one for nothing. No logits are kept.
    """
    import torch
    import torch.distributed as dist

    training = engine.module.training
    engine.eval()
    number, readers = reader(objective, world)
    mine: list[tuple[int, list[Outcome]]] = []
    with torch.no_grad():
        for first in range(0, len(data.rows), readers):
            beat()
            place = first + number
            row = data.rows[place if place < len(data.rows) else 0]
            keys = [f"{seed}/heldout/{place}/{at}" for at in range(len(row))]
            found = objective.outcomes(engine, objective.collate(row, keys, engine.device), row)
            if place < len(data.rows):
                mine.append((place, found))
    engine.train(training)
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, mine)
    # ranks that share a row have all of them found the same
    found_at = {place: found for share in every for place, found in share}
    return [outcome for place in sorted(found_at) for outcome in found_at[place]]
