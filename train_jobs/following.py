"""Wait for a job that keeps nothing on its way: an evaluation, a timing, a search."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cluster import console
from cluster.errors import JobError
from train_jobs.follow import FIRST_WORD_S, POLL_S, Job
from train_jobs.runs import RunDir


def watch(run: RunDir, job: Job, line: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Print each record until the job ends; returns its result.

    Ctrl-C ends the job.

    Raises:
        JobError: it failed, or was interrupted; the message says why.
    """
    try:
        _until_ended(run, job, line)
    except KeyboardInterrupt:
        job.kill()
        raise JobError(f"{run.id} was interrupted; nothing of it is kept") from None
    result = run.read_result()
    if job.state() == "failed" or result is None or result["status"] == "failed":
        told = (result or {}).get("error") or job.why()
        if result is None:
            run.finish({"status": "failed", "error": told})
        raise JobError(told)
    return result


def _until_ended(run: RunDir, job: Job, line: Callable[[dict[str, Any]], str]) -> None:
    offset, running_since = 0, time.monotonic()
    while True:
        state = job.state()
        for record, end in run.read_metrics(offset):
            offset = end
            console.out(line(record))
        if state in {"succeeded", "failed"}:
            return
        if state == "waiting":
            running_since = time.monotonic()
        if not offset and time.monotonic() - running_since > FIRST_WORD_S:
            job.kill()
            raise JobError(f"{run.id}: no word within {FIRST_WORD_S:.0f} s; it was ended")
        time.sleep(POLL_S)
