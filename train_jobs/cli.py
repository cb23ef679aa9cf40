"""``roundhouse train``: submit a training job and follow it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import console
from cluster.errors import ConfigError
from cluster.options import AsJson, DryRun
from train_jobs.verbs import Sets, complete_run, find_cluster, rehearsed

HEAD = 2000
"""Rows of each source that are read before a job is submitted."""

if TYPE_CHECKING:
    from cluster.session import Cluster
    from train_jobs.config import FinetuneConfig
    from train_jobs.runs import RunDir


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the command line."""
    from train_jobs import data_cli, eval_cli, jobs_cli, tune_cli

    app.command("train")(train)
    app.command("tune")(tune_cli.tune)
    app.add_typer(eval_cli.app, name="eval")
    app.add_typer(jobs_cli.app, name="jobs")
    app.add_typer(data_cli.app, name="data")


def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A file of configs/train/.")
    ] = None,
    overrides: Sets = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Go on from a run's newest checkpoint.",
            autocompletion=complete_run,
        ),
    ] = None,
    local: Annotated[
        int | None,
        typer.Option("--local", metavar="N", min=1, help="N processes here, without a cluster."),
    ] = None,
    time: Annotated[
        bool,
        typer.Option(
            "--time",
            help="Run ten steps and say how long all of them will take; with --dry-run beside the "
            "rehearsal.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Submit it although the estimate says too little memory."),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on a cluster and publish the next version of it."""
    console.use_json(as_json)
    from train_jobs.resume import require_one

    require_one(config, resume, overrides or [])
    if resume is not None:
        if time:
            raise ConfigError(
                f"--time with --resume {resume}: it would go on with the run; time the file that "
                f"it began with instead: `roundhouse train CONFIG --time`"
            )
        _resume(resume, overrides or [], local, dry_run)
    elif config is not None:
        _start(config, overrides or [], local, dry_run, time, force)


def _start(
    config: Path,
    overrides: Sequence[str],
    local: int | None,
    dry_run: bool,
    time: bool,
    force: bool,
) -> None:
    from cluster.config import dump
    from train_jobs import timing
    from train_jobs.plan import job_command, resolve, submit_line
    from train_jobs.rehearsal import require_room
    from train_jobs.room import Room
    from train_jobs.runs import RunDir
    from train_jobs.task import Task

    resolved = resolve(config, [*overrides, *([f"run.workers={local}"] if local else [])])
    short = timing.short(resolved) if time else None
    elsewhere = not (local or dry_run or time)  # then a job reads the rest, on all machines
    # a bad row costs a second here, a minute on the cluster
    task = Task.load(resolved, head=HEAD if elsewhere else None)
    cluster = None if local else find_cluster(required=time or not dry_run)
    rehearsal = rehearsed(task, cluster, config, overrides) if dry_run else {}
    if dry_run and not time:
        console.result(rehearsal)
        return
    if cluster:
        require_room(task, Room.of(cluster), force)
    resolved = short or resolved
    run = RunDir.create(config.stem)
    run.config.write_text(dump(resolved))
    if cluster:
        line = submit_line(cluster, config.absolute(), overrides)
        _on_cluster(cluster, run, job_command(run.config), line)
    else:
        _in_processes(run, resolved, resume=False)
    if time:
        found = timing.told(run, task.order.steps)
        console.out(timing.sentence(found))
        console.result({**rehearsal, "time": found} if dry_run else found)
    else:
        _tell(run)


def _tell(run: RunDir) -> None:
    console.result({"path": run.path, **(run.read_result() or {})})


def _resume(name: str, overrides: Sequence[str], local: int | None, dry_run: bool) -> None:
    from train_jobs import resume
    from train_jobs.checkpoint import read_meta
    from train_jobs.room import Room
    from train_jobs.runs import RunDir

    run = RunDir.find(name)
    path = resume.require_resumable(run)
    config = resume.config_of(run, local, overrides)
    resume.require_same_data(path, config)
    cluster = None if local else find_cluster(required=not dry_run)
    if cluster:
        _require_idle(cluster, run)
    line = resume.submit_line(cluster, run, overrides)
    if dry_run:
        console.out(resume.describe(run, config, path, line))
        console.result(
            {
                "dry_run": True,
                "run": run.id,
                "checkpoint": path,
                "step": read_meta(path).step,
                "submit": line,
            }
        )
    elif cluster:
        Room.of(cluster).idle().plan(config, 0).require()  # its memory was enough before
        _on_cluster(cluster, run, resume.job_command(run, overrides), line)
        _tell(run)
    else:
        _in_processes(run, config, resume=True)
        _tell(run)


def _on_cluster(cluster: Cluster, run: RunDir, entrypoint: str, line: str) -> None:
    """Submit the next attempt of a run and follow it; ``line`` does the same by hand."""
    from cluster.session import runtime_env, upload_code
    from train_jobs import attempts
    from train_jobs.follow import follow
    from train_jobs.submitted import SubmittedJob

    console.out(f"run {run.id}: {run.path}")
    console.out(line)
    package = upload_code(cluster)
    environment = runtime_env(package, {"ROUNDHOUSE_HOME": str(cluster.home)})
    offset = run.metrics_end()
    attempt = attempts.begin(run, lambda name: name)
    job = SubmittedJob(cluster, run, attempt.name(run))
    job.submit(environment, entrypoint)
    follow(run, job, offset)


def _in_processes(run: RunDir, config: FinetuneConfig, resume: bool) -> None:
    from train_jobs.finetune import execute

    execute(run, config, local=True, resume=resume)


def _require_idle(cluster: Cluster, run: RunDir) -> None:
    """Refuse to go on with a run whose last job waits for its start, or has not ended yet."""
    from train_jobs import attempts
    from train_jobs.jobs import statuses

    known = attempts.history(run)
    submission = known[-1].submission if known else None
    if submission and statuses(cluster).get(submission) in {"PENDING", "RUNNING"}:
        raise attempts.still_running(run)
