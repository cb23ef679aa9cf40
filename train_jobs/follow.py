"""Follow a run until it ends: live in a terminal, plain lines without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from cluster import console
from cluster.console import counted
from cluster.errors import JobError
from train_jobs import attempts
from train_jobs.runs import RunDir

State = Literal["waiting", "running", "succeeded", "failed"]
POLL_S = 0.25
FIRST_WORD_S = 300.0
"""From the start of the processes until all ranks have met: mostly imports."""
STOP_S = 120.0
"""From Ctrl-C to the end of the step it was in, and its checkpoint."""

Show = Callable[[Mapping[str, Any]], None]


class Job(Protocol):
    """What runs: a submitted job, or processes of this machine."""

    def state(self) -> State:
        """Return where it stands, at most a second old."""

    def why(self) -> str:
        """Return the cause of a failure and where its log lies."""

    def kill(self) -> None:
        """End it now."""

    def detach(self) -> str | None:
        """Return how to find it again, or None where it cannot live on alone."""


def follow(run: RunDir, job: Job, offset: int = 0) -> int:
    """Show progress until the run ends; returns 0.

    ``offset`` is the place in ``metrics.jsonl`` behind what an earlier attempt wrote. Ctrl-C asks
    the run to stop after the step it is in; a second one leaves it alone.

    Raises:
        JobError: the run failed or was stopped; the message names it and where its log lies.
    """
    with display() as show:
        try:
            _watch(run, job, show, None, offset)
        except KeyboardInterrupt:
            _stop(run, job, show)
    state, result = job.state(), run.read_result()
    stopped = result is not None and result["status"] == "stopped"  # by whomever, even by Ray
    if result is None or (state == "failed" and not stopped) or result["status"] == "failed":
        told = (result or {}).get("error")
        why = job.why()
        told = f"{told}\n{why}" if told and told not in why else why
        if not attempts.is_driven_elsewhere(run):
            run.fail(told)
        raise JobError(told + way_on(run))
    if stopped:
        raise JobError(
            f"run {run.id} was stopped after step {result['steps']}; nothing was published"
            f"{way_on(run)}"
        )
    summary(run, result)
    return 0


def way_on(run: RunDir) -> str:
    """Return a line on how to go on from the newest checkpoint; nothing where there is none."""
    from train_jobs.checkpoint import newest, read_meta

    path, _ = newest(run.checkpoints, deep=False)
    if path is None:
        return ""
    return f"\ngo on from step {read_meta(path).step}: roundhouse train --resume {run.id}"


def summary(run: RunDir, result: Mapping[str, Any]) -> None:
    """Print what a run that succeeded has done."""
    if "heldout_loss_before" in result:
        before, after = result["heldout_loss_before"], result["heldout_loss_after"]
        console.out(f"held-out loss  {before:.4f} before, {after:.4f} after")
    if result["published"]:
        console.out(f"published      {result['published']} (from {result['base']})")
    console.out(
        f"trained        {result['steps']} steps, {result['tokens']} tokens at "
        f"{result['tokens_per_s']:.0f} tokens/s, {result['seconds']:.0f} s in all\n"
        f"record         {run.result}"
    )


def _watch(run: RunDir, job: Job, show: Show, limit_s: float | None, offset: int) -> None:
    """Show each new record until the job has ended, or ``limit_s`` has passed (TimeoutError)."""
    heard, began = limit_s is not None, time.monotonic()
    running_since: float | None = None
    while True:
        state = job.state()
        for record, end in run.read_metrics(offset):
            heard, offset = True, end
            show(record)
        if state in {"succeeded", "failed"}:
            return
        now = time.monotonic()
        if state == "running" and running_since is None:
            running_since = now
        if limit_s is not None and now - began > limit_s:
            raise TimeoutError
        if not heard and running_since is not None and now - running_since > FIRST_WORD_S:
            job.kill()
            raise JobError(
                f"run {run.id}: the ranks did not meet within {FIRST_WORD_S:.0f} s; it was ended. "
                f"{job.why()}"
            )
        time.sleep(POLL_S)


def _stop(run: RunDir, job: Job, show: Show) -> None:
    run.stop.touch()
    again = job.detach()
    more = f"; Ctrl-C again leaves it to itself ({again})" if again else ""
    console.note(f"\nstopping run {run.id} after the step it is in, nothing is published{more}")
    try:
        # what came before the interruption has been shown
        _watch(run, job, show, STOP_S, run.metrics_end())
    except TimeoutError:
        console.note(f"it did not stop within {STOP_S:.0f} s and is ended now")
        job.kill()
    except KeyboardInterrupt:
        if again:
            raise
        job.kill()
    if run.read_result() is None:
        run.fail(f"run {run.id} was interrupted")


@contextmanager
def display() -> Iterator[Show]:
    """Yield what shows one record of ``metrics.jsonl``."""
    if console.is_plain() or console.is_json():
        yield lambda record: console.out(line(record))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[told]}", markup=False),
    )
    with Progress(*columns, transient=False) as progress:
        task = progress.add_task("train", total=None, told="waiting for the ranks")

        def show(record: Mapping[str, Any]) -> None:
            if "event" in record:
                progress.console.print(line(record), markup=False, highlight=False)
                progress.update(task, total=record.get("steps"), told=record["event"])
            else:
                told = line(record).partition("  ")[2]
                progress.update(task, completed=record["step"], total=record["steps"], told=told)

        yield show


def line(record: Mapping[str, Any]) -> str:
    """Return one record as a line for people."""
    match record.get("event"):
        case None:
            return (
                f"step {record['step']}/{record['steps']}  loss {record['loss']:.4f}  "
                f"{record['tokens_per_s']:.0f} tokens/s  {duration(record['eta_s'])} left"
            )
        case "ready":
            return (
                f"{counted(record['world'], 'rank')} ready in {record['seconds']:.0f} s: "
                f"{record['engine']}, ZeRO {record['zero_stage']}, "
                f"{record['dtype']} on {record['device']}; {_trained(record)}"
                f"{record['rows']} rows, {record['tokens']} tokens ({record['trained_tokens']} "
                f"trained), {record['steps']} steps"
            )
        case "met":
            return f"{counted(record['world'], 'rank')} at work: loading model and rows"
        case "reference":
            return f"the base is asked about {record['documents']} answers first, as the reference"
        case "evaluated":
            return _held_out(record)
        case "checkpoint":
            return f"checkpoint at step {record['step']}: {record['path']}"
        case "resumed":
            return f"resumed from the checkpoint of step {record['step']}{_resized(record)}"
        case "skipped":
            return f"passed over as torn: {'; '.join(record['checkpoints'])}"
        case "best":
            return f"back to the best checkpoint, of step {record['step']}"
        case "published":
            return f"published {record['ref']}"
        case "live":
            return f"{record['ref']} is live, after {record['seconds']:.1f} s"
        case "not_live":
            return f"step {record['step']} does not go live: {record['why']}"
        case "untracked":
            return f"{record['sink']} is left out from here on: {record['why']}"
        case other:
            return str(other)


def _resized(record: Mapping[str, Any]) -> str:
    before, now = record.get("from_world"), record.get("world")
    return "" if before == now else f", written by {before} ranks, with {now}"


def _held_out(record: Mapping[str, Any]) -> str:
    others = [
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in record.items()
        if name not in ("loss", "event", "when", "time") and isinstance(value, float)
    ]
    beside = f" ({', '.join(others)})" if others else ""
    return f"held-out loss {record['when']}: {record['loss']:.4f}{beside}"


def _trained(record: Mapping[str, Any]) -> str:
    if record["trainable"] == record["parameters"]:
        return ""
    trainable, all_of = record["trainable"] / 1e6, record["parameters"] / 1e6
    return f"an adapter of {trainable:.1f} beside {all_of - trainable:.0f} million parameters; "


def duration(seconds: float) -> str:
    """Return ``75 s`` as ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
