"""``roundhouse tune``: search the fields of a training run, and publish the best."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import console
from cluster.options import AsJson, DryRun
from train_jobs.verbs import Sets, find_cluster


def tune(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A file of configs/train/ with a tune: block.")
    ],
    overrides: Sets = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train with other values of some fields, compare on held-out rows, publish the best."""
    console.use_json(as_json)
    from cluster.config import dump
    from train_jobs.plan import demand, hand_line, resolve
    from train_jobs.task import Task
    from train_jobs.tune import FILE, check

    resolved = resolve(config, overrides or [])
    told = check(resolved)
    Task.load(resolved)  # a bad row costs a second here, a minute on the cluster
    cluster = find_cluster(required=not dry_run)
    points = told.points()
    if dry_run:
        for point in points:
            console.out(_values(point))
        line = hand_line(cluster, _entrypoint("RUN_FOLDER"))
        console.out(
            f"{len(points)} trials, compared by {told.metric} ({told.mode})\nby hand: {line}"
        )
        console.result({"dry_run": True, "points": points, "metric": told.metric, "submit": line})
        return
    assert cluster is not None, "it is required"
    from cluster.resources import plan
    from cluster.session import runtime_env, upload_code
    from cluster.status import room
    from train_jobs.following import watch
    from train_jobs.runs import RunDir
    from train_jobs.submitted import SubmittedJob

    plan([demand(resolved)], [node.idle() for node in room(cluster)]).require()
    search = RunDir.create(f"{config.stem}-tune")
    (search.path / FILE).write_text(dump(resolved))
    entrypoint = _entrypoint(str(search.path))
    console.out(f"search {search.id}: {search.path}, {len(points)} trials")
    console.out(hand_line(cluster, entrypoint))
    environment = runtime_env(upload_code(cluster), {"ROUNDHOUSE_HOME": str(cluster.home)})
    job = SubmittedJob(cluster, search, search.id)
    job.submit(environment, entrypoint)
    result = watch(search, job, line_of)
    _show(result)
    console.result({"path": search.path, **result})


def line_of(record: Mapping[str, Any]) -> str:
    """Return one record of a search as a line for people."""
    match record.get("event"):
        case "search":
            return f"{record['trials']} trials, {record['concurrent']} at a time"
        case "waiting":
            return (
                f"trial {record['run']}: waits for {record['wanted']}; free: {record['free']}, "
                "`roundhouse status` shows who has the rest"
            )
        case other if other != "trial":
            return str(other)
    value = record.get("value")
    told = "begun" if value is None else f"{record['metric']} {value:.4f}"
    return f"trial {record['run']}: {told}  ({_values(record['point'])})"


def _entrypoint(folder: str) -> str:
    return shlex.join(["python", "-m", "train_jobs.tune", folder])


def _values(point: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={json.dumps(value)}"
        for name, value in point.items()
    )


def _show(result: Mapping[str, Any]) -> None:
    metric = result["metric"]
    console.table(
        f"trials by {metric}, {'lowest' if result['mode'] == 'min' else 'highest'} first",
        ["run", "values", metric, "steps", "state"],
        [
            (
                one["run"],
                _values(one["point"]),
                None if one["value"] is None else f"{one['value']:.4f}",
                one["steps"],
                one["state"],
            )
            for one in result["trials"]
        ],
    )
    if result["published"]:
        console.out(f"published {result['published']} (run {result['best']})")
