"""``roundhouse jobs``: list, logs, stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import console
from cluster.errors import ClusterError, ConfigError
from cluster.options import AsJson, DryRun
from train_jobs.verbs import complete_run, find_cluster

if TYPE_CHECKING:
    from cluster.session import Cluster

FOLLOW_S = 1.0
STOP_S = 120.0

app = typer.Typer(help="Training jobs: what they do, what they print, end them.")
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run's id, as `jobs list` shows it.", autocompletion=complete_run
    ),
]


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="The newest N.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the runs, the newest first: state, step, loss, when they started."""
    console.use_json(as_json)
    from train_jobs import jobs
    from train_jobs.runs import every

    known = _statuses()
    rows = [jobs.overview(run, known) for run in every()[:limit]]
    shown = [
        (
            row["run"],
            row["state"],
            f"{row['step'] or 0}/{row['steps']}" if row["steps"] else None,
            f"{row['loss']:.4f}" if row["loss"] is not None else None,
            row["started"],
            row["checkpoint"],
            row["published"],
        )
        for row in rows
    ]
    columns = ["run", "state", "step", "loss", "started (UTC)", "checkpoint", "published"]
    console.table("runs", columns, shown)
    console.result({"runs": rows})


@app.command("logs")
def show_logs(
    name: Run,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what the newest job of a run printed."""
    console.use_json(as_json)
    from train_jobs import jobs
    from train_jobs.runs import RunDir

    if follow and as_json:
        raise ConfigError("--follow prints lines as they come, --json one object; choose one")
    run = RunDir.find(name)
    log = jobs.log_of(run, _cluster)
    console.out(log.rstrip("\n"))
    while follow and jobs.state_of(run, _statuses()) in {"running", "waiting"}:
        time.sleep(FOLLOW_S)
        log, before = jobs.log_of(run, _cluster), log
        if more := log[len(before) :].strip("\n"):
            console.out(more)
    console.result({"run": run.id, "log": log})


@app.command("stop")
def stop_job(
    name: Run,
    timeout: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds to save in, before it is ended.")
    ] = STOP_S,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Have a run save a checkpoint, and end it; `roundhouse train --resume RUN` goes on."""
    console.use_json(as_json)
    from train_jobs import jobs
    from train_jobs.runs import RunDir

    run = RunDir.find(name)
    if dry_run:
        now = jobs.overview(run, _statuses())
        would_stop = now["state"] in {"running", "waiting"}
        console.out(
            f"run {run.id} is {now['state']} at step {now['step'] or 0}; it would be asked to save "
            f"a checkpoint, and ended after {timeout:.0f} s if it has not"
        )
        console.result({"dry_run": True, **now, "would_stop": would_stop})
        return
    for told in jobs.stop(run, find_cluster(required=False), timeout):
        console.out(told)
    console.result(jobs.overview(run, _statuses()))


def _statuses() -> dict[str, str]:
    """Return what the cluster says of its jobs; nothing where none answers."""
    from train_jobs.jobs import statuses

    try:
        cluster = find_cluster(required=False)
        return statuses(cluster) if cluster else {}
    except ClusterError:
        return {}


def _cluster() -> Cluster:
    found = find_cluster(required=True)
    assert found is not None, "a required cluster is found or an error"
    return found
