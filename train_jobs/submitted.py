"""A training job on the cluster, over the REST interface: submit, watch, read its log, end it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError
from train_jobs.runs import RunDir

if TYPE_CHECKING:
    from cluster.session import Cluster
    from train_jobs.follow import State

ENDED: dict[str, Any] = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "failed"}
TAIL_LINES = 15


class SubmittedJob:
    """One attempt of a run; ``id`` is Ray's submission id."""

    def __init__(self, cluster: Cluster, run: RunDir, submission: str) -> None:
        self.cluster, self.run, self.id = cluster, run, submission
        self._state: State = "waiting"
        self._asked = 0.0

    def submit(self, runtime_env: dict[str, Any], entrypoint: str) -> None:
        """Start it."""
        body = {
            "submission_id": self.id,
            "entrypoint": entrypoint,
            "runtime_env": runtime_env,
            "metadata": {"run": str(self.run.path)},
        }
        self.cluster.json("POST", "/api/jobs/", json=body, timeout_s=60.0)

    def state(self) -> State:
        """Return where it stands, asking at most once a second."""
        if self._state not in {"succeeded", "failed"} and time.monotonic() - self._asked > 1.0:
            told = self.cluster.json("GET", f"/api/jobs/{self.id}")["status"]
            self._asked = time.monotonic()
            self._state = ENDED.get(told) or ("running" if told == "RUNNING" else "waiting")
        return self._state

    def log(self) -> str:
        """Return what its driver and its ranks have printed so far."""
        return str(self.cluster.json("GET", f"/api/jobs/{self.id}/logs").get("logs", ""))

    def why(self) -> str:
        """Return the end of the job's log, and how to see all of it."""
        try:
            log = self.log()
        except ClusterError as error:
            log = f"(its log cannot be read: {error})"
        lines = [text for text in log.splitlines() if text.strip()]
        told = [text for text in lines if text.startswith("error: ")][-1:] or lines[-TAIL_LINES:]
        shown = "\n".join(told).removeprefix("error: ")
        return f"run {self.run.id} failed:\n{shown}\nwhole log: roundhouse jobs logs {self.run.id}"

    def kill(self) -> None:
        """Stop the job."""
        self.cluster.http("POST", f"/api/jobs/{self.id}/stop")

    def detach(self) -> str:
        """Return how to find the job again."""
        return f"roundhouse jobs logs --follow {self.run.id}"
