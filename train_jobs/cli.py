"""``roundhouse train``: submit a training job and follow it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import console
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from cluster.session import Cluster
    from train_jobs.config import FinetuneConfig
    from train_jobs.follow import State
    from train_jobs.runs import RunDir
    from train_jobs.task import Task

ENDED: dict[str, Any] = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "failed"}
TAIL_LINES = 15


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the command line."""
    app.command("train")(train)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A file of configs/train/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one field, as optim.lr=1e-4."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")
    ] = False,
    local: Annotated[
        int | None,
        typer.Option("--local", metavar="N", min=1, help="N processes here, without a cluster."),
    ] = None,
) -> None:
    """Fine-tune a model on a cluster and publish the next version of it."""
    from cluster.config import dump
    from train_jobs.plan import resolve, submit_line
    from train_jobs.runs import RunDir
    from train_jobs.task import Task

    sets = [*(overrides or []), *([f"run.workers={local}"] if local else [])]
    resolved = resolve(config, sets)
    task = Task.load(resolved)  # a bad row costs a second here, a minute on the cluster
    cluster = None if local else find_cluster(required=not dry_run)
    if dry_run:
        rehearse(task, cluster, config, overrides or [])
        return
    if cluster:
        _require_room(cluster, resolved)
    run = RunDir.create(config.stem)
    run.config.write_text(dump(resolved))
    if cluster:
        console.out(f"run {run.id}: {run.path}")
        console.out(submit_line(cluster, config.absolute(), overrides or []))
        raise typer.Exit(_on_cluster(cluster, run))
    from train_jobs.follow import follow
    from train_jobs.local import LocalRanks

    console.out(f"run {run.id}: {run.path}")
    run.claim()
    raise typer.Exit(follow(run, LocalRanks.start(run, resolved.run.workers)))


class SubmittedJob:
    """A job of the cluster, over its REST interface."""

    def __init__(self, cluster: Cluster, run: RunDir) -> None:
        self.cluster, self.run = cluster, run
        self._state: State = "waiting"
        self._asked = 0.0

    def submit(self, runtime_env: dict[str, Any], entrypoint: str) -> None:
        """Start it; its id is the run's."""
        body = {
            "submission_id": self.run.id,
            "entrypoint": entrypoint,
            "runtime_env": runtime_env,
            "metadata": {"run": str(self.run.path)},
        }
        self.cluster.json("POST", "/api/jobs/", json=body, timeout_s=60.0)

    def state(self) -> State:
        """Return where it stands, asking at most once a second."""
        if self._state not in {"succeeded", "failed"} and time.monotonic() - self._asked > 1.0:
            told = self.cluster.json("GET", f"/api/jobs/{self.run.id}")["status"]
            self._asked = time.monotonic()
            self._state = ENDED.get(told) or ("running" if told == "RUNNING" else "waiting")
        return self._state

    def why(self) -> str:
        """Return the end of the job's log, and how to see all of it."""
        try:
            log = self.cluster.json("GET", f"/api/jobs/{self.run.id}/logs").get("logs", "")
        except ClusterError as error:
            log = f"(its log cannot be read: {error})"
        lines = [text for text in log.splitlines() if text.strip()]
        told = [text for text in lines if text.startswith("error: ")][-1:] or lines[-TAIL_LINES:]
        shown = "\n".join(told).removeprefix("error: ")
        return (
            f"run {self.run.id} failed:\n{shown}\n"
            f"whole log: ray job logs --address {self.cluster.dashboard} {self.run.id}"
        )

    def kill(self) -> None:
        """Stop the job."""
        self.cluster.http("POST", f"/api/jobs/{self.run.id}/stop")

    def detach(self) -> str:
        """Return how to find the job again."""
        return f"ray job logs --address {self.cluster.dashboard} --follow {self.run.id}"


def rehearse(task: Task, cluster: Cluster | None, config: Path, overrides: Sequence[str]) -> None:
    """Print what a run would be, and how to start it by hand."""
    from train_jobs.plan import describe, submit_line

    nodes = _nodes(cluster) if cluster else None
    console.out(describe(task, nodes, submit_line(cluster, config.absolute(), overrides)))


def _on_cluster(cluster: Cluster, run: RunDir) -> int:
    from cluster.session import runtime_env, upload_code
    from train_jobs.follow import follow
    from train_jobs.plan import job_command

    package = upload_code(cluster)
    environment = runtime_env(package, {"ROUNDHOUSE_HOME": str(cluster.home)})
    job = SubmittedJob(cluster, run)
    job.submit(environment, job_command(run.config))
    return follow(run, job)


def find_cluster(required: bool) -> Cluster | None:
    """Return the running cluster; ClusterError, or None where it is not required."""
    from cluster.session import current

    try:
        return current()
    except ClusterError:
        if required:
            raise
        return None


def _nodes(cluster: Cluster) -> list[Any]:
    from cluster.status import nodes

    return nodes(cluster)


def _require_room(cluster: Cluster, config: FinetuneConfig) -> None:
    """Refuse what cannot fit even on idle machines; what is busy now may be free in a moment."""
    from cluster.resources import plan
    from train_jobs.plan import demand

    idle = [node.idle() for node in _nodes(cluster)]
    plan([demand(config)], idle).require()
