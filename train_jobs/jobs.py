"""What the runs of this home are doing, as their folders and the cluster tell it. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError, JobError
from train_jobs import attempts, checkpoint
from train_jobs.follow import line
from train_jobs.local import logs
from train_jobs.runs import RunDir
from train_jobs.submitted import SubmittedJob

if TYPE_CHECKING:
    from cluster.session import Cluster

POLL_S = 0.5
END_S = 30.0
"""From ending a job by force until it is gone."""


def statuses(cluster: Cluster) -> dict[str, str]:
    """Return Ray's word for each submitted job, by submission id."""
    jobs = cluster.json("GET", "/api/jobs/")
    return {job["submission_id"]: job["status"] for job in jobs if job.get("submission_id")}


def state_of(run: RunDir, known: Mapping[str, str]) -> str:
    """Return ``running``, ``waiting``, ``succeeded``, ``stopped``, ``failed`` or ``lost``.

    ``known`` is what `statuses` gave, or nothing without a cluster. A run is lost when whatever
    drove it was killed: nobody wrote a result.
    """
    if attempts.is_driven(run):
        return "running"
    if result := run.read_result():
        return str(result["status"])
    last = attempts.history(run)[-1:]
    status = known.get(last[0].submission or "") if last else None
    return "waiting" if status in {"PENDING", "RUNNING"} else "lost"


def overview(run: RunDir, known: Mapping[str, str]) -> dict[str, Any]:
    """Return one row of ``jobs list``."""
    last = run.last_step() or {}
    began = attempts.history(run)
    whole, _ = checkpoint.newest(run.checkpoints, deep=False)
    return {
        "run": run.id,
        "state": state_of(run, known),
        "step": last.get("step"),
        "steps": last.get("steps"),
        "loss": last.get("loss"),
        "started": _utc(began[0].started) if began else None,
        "attempts": len(began),
        "checkpoint": checkpoint.read_meta(whole).step if whole else None,
        "published": (run.read_result() or {}).get("published"),
    }


def log_of(run: RunDir, cluster: Callable[[], Cluster]) -> str:
    """Return what the newest attempt printed: its job's log, or those of its processes.

    Raises:
        JobError: the run has not been started, or the log went with the cluster that held it.
    """
    known = attempts.history(run)
    if not known:
        raise JobError(f"run {run.id} was never started; {run.path} holds its configuration")
    submission = known[-1].submission
    if submission is None:
        return "".join(_headed(path.name, path.read_text(errors="replace")) for path in logs(run))
    try:
        return SubmittedJob(cluster(), run, submission).log()
    except ClusterError as error:
        told = "\n".join(line(record) for record, _ in run.read_metrics())
        raise JobError(
            f"the log of run {run.id} lay on the cluster that ran it: {error}\n"
            f"what the run itself wrote to {run.metrics}:\n{told}"
        ) from None


def stop(run: RunDir, cluster: Cluster | None, limit_s: float) -> Iterator[str]:
    """Ask a run to save and end; yield what happens meanwhile, last how it ended.

    After ``limit_s`` seconds the job is ended by force: its earlier checkpoints stay.

    Raises:
        JobError: the run does not run, or cannot be ended from here.
    """
    known = statuses(cluster) if cluster else {}
    state = state_of(run, known)
    if state not in {"running", "waiting"}:
        raise JobError(f"run {run.id} does not run: {state}; `roundhouse jobs list` shows all")
    run.stop.touch()
    yield f"stopping run {run.id}: it saves a checkpoint after the step it is in"
    began = told = time.monotonic()
    while time.monotonic() - began < limit_s:
        if state_of(run, statuses(cluster) if cluster else {}) not in {"running", "waiting"}:
            yield _ended(run)
            return
        if time.monotonic() - told > 5.0:
            told = time.monotonic()
            at = (run.last_step() or {}).get("step", 0)
            yield f"step {at}; {told - began:.0f} s of {limit_s:.0f} s (--timeout)"
        time.sleep(POLL_S)
    yield f"it did not stop within {limit_s:.0f} s and is ended now"
    end(run, cluster)
    yield _ended(run)


def end(run: RunDir, cluster: Cluster | None) -> None:
    """End a run's job by force, and wait until it is gone; JobError when it is not."""
    last = attempts.history(run)[-1]
    if last.submission and cluster:
        SubmittedJob(cluster, run, last.submission).kill()
    else:
        attempts.terminate(run)
    deadline = time.monotonic() + END_S
    while attempts.is_driven(run):
        if time.monotonic() > deadline:
            raise JobError(f"{attempts.still_running(run)}; it was asked to end {END_S:.0f} s ago")
        time.sleep(POLL_S)
    if run.read_result() is None:
        run.fail(f"run {run.id} was ended by force")


def _ended(run: RunDir) -> str:
    from train_jobs.follow import way_on

    result = run.read_result() or {"status": "lost"}
    step = (run.last_step() or {}).get("step", 0)
    return f"run {run.id}: {result['status']} after step {step}{way_on(run)}"


def _headed(name: str, text: str) -> str:
    return f"==> {name} <==\n{text}" + ("" if text.endswith("\n") or not text else "\n")


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
