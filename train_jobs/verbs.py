"""What the verbs of training share: an option, a completion, the cluster, a rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import console
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from cluster.session import Cluster
    from train_jobs.task import Task

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one field, as optim.lr=1e-4."),
]


def complete_run(incomplete: str) -> list[str]:
    """Return the ids of runs for the tab key, the newest first."""
    from train_jobs.runs import every

    return [run.id for run in every() if run.id.startswith(incomplete)]


def find_cluster(required: bool) -> Cluster | None:
    """Return the running cluster; ClusterError, or None where it is not required."""
    from cluster.session import current

    try:
        return current()
    except ClusterError:
        if required:
            raise
        return None


def rehearse(task: Task, cluster: Cluster | None, config: Path, overrides: Sequence[str]) -> None:
    """Print what a run would be, and how to start it by hand."""
    console.result(rehearsed(task, cluster, config, overrides))


def rehearsed(
    task: Task, cluster: Cluster | None, config: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Print it for people, and return it."""
    from train_jobs.plan import submit_line
    from train_jobs.rehearsal import describe, rehearsal
    from train_jobs.room import Room

    room = Room.of(cluster) if cluster else None
    told = rehearsal(task, room, submit_line(cluster, config.absolute(), overrides))
    console.out(describe(told))
    return told
