"""``python -m train_jobs.evaluate_job RUN_FOLDER``: the driver of an evaluation on the cluster.

Its ranks are plain actors, not Ray Train: nothing is saved, so nothing is gone on with, and the
driver waits for all of them or for the first that fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import console
from cluster.config import load
from cluster.errors import JobError, RoundhouseError
from cluster.resources import Demand
from cluster.session import connect
from train_jobs.evaluate_rank import FILE, run_rank
from train_jobs.evaluation import EvaluationConfig
from train_jobs.following import Silence
from train_jobs.group import Place, free_address
from train_jobs.runs import RunDir

START_S = 120.0
"""From asking for the ranks to the answer of all of them."""
POLL_S = 1.0


class Rank:
    """An actor that becomes one rank."""

    def place(self) -> tuple[str, str]:
        """Return this machine's id, and an address that is free on it."""
        import ray
        import ray.util

        node = ray.get_runtime_context().get_node_id()
        return node, free_address(ray.util.get_node_ip_address())

    def run(self, run: str, place: Place, revision: str | None) -> None:
        """Measure; see :func:`train_jobs.evaluate_rank.run_rank`."""
        run_rank(RunDir(Path(run)), place, revision)


def demand(config: EvaluationConfig) -> Demand:
    """Return what the ranks of an evaluation reserve."""
    run = config.run
    return Demand("evaluation rank", run.num_cpus, run.num_gpus, count=run.workers)


def drive(run: RunDir, config: EvaluationConfig) -> None:
    """Start all ranks and wait for them.

    Raises:
        JobError: a rank failed, was lost, or said nothing for ``run.stall_s``.
        NotEnough: the cluster has no room for them.
    """
    connect()
    import ray

    from train_jobs.launch import code_revision, wait_for_room

    wait_for_room(demand(config))
    made = ray.remote(num_cpus=config.run.num_cpus, num_gpus=config.run.num_gpus)(Rank)
    ranks = [made.remote() for _ in range(config.run.workers)]
    try:
        found: list[tuple[str, str]] = ray.get([r.place.remote() for r in ranks], timeout=START_S)
        places = places_of(found)
        revision = code_revision()
        waiting = [
            rank.run.remote(str(run.path), place, revision)
            for rank, place in zip(ranks, places, strict=True)
        ]
        silence = Silence(run, config.run.stall_s)
        while waiting:  # the first that fails ends the others, who wait for it
            ended, waiting = ray.wait(waiting, timeout=POLL_S)
            ray.get(ended)
            silence.check()
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RoundhouseError):
            raise cause from None
        raise JobError(f"evaluation {run.id}: a rank failed: {cause!r:.2000}") from error
    except ray.exceptions.RayError as error:
        raise JobError(f"evaluation {run.id}: a rank was lost: {error!s:.2000}") from error
    finally:
        for rank in ranks:
            ray.kill(rank)


def places_of(found: Sequence[tuple[str, str]]) -> list[Place]:
    """Return each rank's place from the machines and addresses that they told."""
    on_node = Counter(node for node, _ in found)
    seen: Counter[str] = Counter()
    places = []
    for rank, (node, _) in enumerate(found):
        place = Place(rank, len(found), seen[node], on_node[node], found[0][1])
        seen[node] += 1
        places.append(place)
    return places


def main(argv: Sequence[str]) -> int:
    """Measure; 0, or 1 with the reason in ``result.json``."""
    run = RunDir(Path(argv[0]))
    try:
        drive(run, load(run.path / FILE, EvaluationConfig))
    except RoundhouseError as error:
        failed: dict[str, Any] = {"status": "failed", "error": str(error)}
        run.finish(failed)
        console.error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
