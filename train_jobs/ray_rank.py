"""How a Ray Train worker becomes a rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cluster.errors import RoundhouseError
from train_jobs.group import Place, free_address
from train_jobs.ports import RayWorld
from train_jobs.rank import run_rank
from train_jobs.runs import RunDir
from train_jobs.watch import Lost, wrong

LAST = 19
"""The nicest that a process may be; Ray's own workers, replicas among them, are at 15."""


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Find this worker's place, let rank 0 tell its address, and run.

    What is wrong with the run is returned as the result, also by ranks that only lost contact with
    the one that found it: Ray Train would take an exception for a failure that another attempt may
    mend, and find it again ``run.max_failures`` times.
    """
    import ray.train
    import ray.util
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    own = free_address(ray.util.get_node_ip_address()) if rank == 0 else None
    place = Place(
        rank=rank,
        size=size,
        local_rank=context.get_local_rank(),
        local_size=context.get_local_world_size(),
        address=broadcast_from_rank_zero(own),
    )
    run = RunDir(Path(spec["run"]))
    # where training and serving share cores, people who wait for an answer go first
    os.nice(LAST - os.nice(0))
    try:
        return run_rank(run, place, RayWorld(rank, size, run), spec["revision"], spec["resume"])
    except Lost:
        found = wrong(run.pulses)
        if found is None:
            raise
    except RoundhouseError as error:
        found = wrong(run.pulses) or (rank, str(error))
    who, why = found
    return {"status": "failed", "error": f"run {run.id}: rank {who} failed: {why}"}
