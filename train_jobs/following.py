"""Wait for a job that keeps nothing on its way: an evaluation, a timing, a search."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cluster import console
from cluster.errors import JobError
from train_jobs.follow import FIRST_WORD_S, POLL_S, Job
from train_jobs.runs import RunDir


class Silence:
    """How long a run has said nothing: a record of its metrics is the sign that it goes on."""

    def __init__(self, run: RunDir, limit_s: float) -> None:
        """Listen from now on."""
        self._run, self._limit_s = run, limit_s
        self._end, self._last, self._since = 0, "none", time.monotonic()

    def check(self) -> None:
        """Raise JobError where it has said nothing for longer than the limit."""
        for record, end in self._run.read_metrics(self._end):
            self._last, self._since = str(record.get("event", "a step")), time.monotonic()
            self._end = end
        if time.monotonic() - self._since > self._limit_s:
            raise JobError(
                f"{self._run.id}: no word for {self._limit_s:g} s (run.stall_s), the last was "
                f"'{self._last}'; it was ended. See whether whom the objective asks (a reward, a "
                "served model) still answers, or raise run.stall_s if one row takes that long"
            )


def watch(
    run: RunDir,
    job: Job,
    line: Callable[[dict[str, Any]], str],
    stall_s: float | None = None,
) -> dict[str, Any]:
    """Print each record until the job ends; returns its result.

    Ctrl-C ends the job, and so do ``stall_s`` seconds without a record.

    Raises:
        JobError: it failed, or was interrupted; the message says why.
    """
    silence = Silence(run, stall_s) if stall_s else None
    try:
        _until_ended(run, job, line, silence)
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


def _until_ended(
    run: RunDir, job: Job, line: Callable[[dict[str, Any]], str], silence: Silence | None
) -> None:
    offset, running_since = 0, time.monotonic()
    while True:
        state = job.state()
        for record, end in run.read_metrics(offset):
            offset = end
            console.out(line(record))
        if state in {"succeeded", "failed"}:
            return
        if silence:
            try:
                silence.check()
            except JobError as error:
                job.kill()
                run.fail(str(error))
                raise
        if state == "waiting":
            running_since = time.monotonic()
        if not offset and time.monotonic() - running_since > FIRST_WORD_S:
            job.kill()
            raise JobError(f"{run.id}: no word within {FIRST_WORD_S:.0f} s; it was ended")
        time.sleep(POLL_S)
