"""A machine leaves the cluster under a run, and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import session
from tests.ray.cluster_fixtures import ROOT, Rig
from tests.ray.test_training import write_config
from train_jobs.runs import RunDir

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
CPUS = 6
"""Of each rank: the head's eight hold one, and so does the second machine."""


class Machine:
    """A second node of the cluster, as a raylet of its own on this machine."""

    def __init__(self, cluster: Rig) -> None:
        there = cluster.cluster
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={there.address}"]
            + ["--block"]
            + [f"--num-cpus={CPUS}", "--num-gpus=0", "--node-ip-address=127.0.0.1"],
            env={**cluster.env, **session.driver_environment(there)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def vanish(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait(run: RunDir, until: Callable[[list[dict[str, Any]]], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not until([record for record, _ in run.read_metrics()]):
        assert run.read_result() is None, run.read_result()
        assert time.monotonic() < deadline, list(run.read_metrics())[-3:]
        time.sleep(0.2)


def worlds(records: list[dict[str, Any]]) -> list[int]:
    return [record["world"] for record in records if record.get("event") == "ready"]


def test_tc11_a_node_leaves_and_returns_and_no_row_is_lost_or_repeated(
    cluster: Rig, tmp_path: Path
) -> None:
    elastic = {"workers": {"min": 1, "max": 2}, "resize_s": 5, "num_cpus": CPUS, "threads": 1}
    limits = {"steps": 4000, "save_every": 4, "max_failures": 3, "timeout_s": 30}
    config = write_config(cluster, tmp_path, {**elastic, **limits})
    machine = Machine(cluster)
    before = set((cluster.home / "runs").glob("*"))
    followed = subprocess.Popen(
        cluster.command("train", str(config)), cwd=ROOT, env=cluster.env, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (found := set((cluster.home / "runs").glob("*/config.json"))) or not (
            made := {path.parent for path in found} - before
        ):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run = RunDir(made.pop())
        wait(run, lambda told: worlds(told) == [2] and len(told) > 12, 120)
        machine.vanish()
        wait(run, lambda told: worlds(told)[-1] == 1 and "step" in told[-1], 180)
        machine = Machine(cluster)
        wait(run, lambda told: worlds(told)[-1] == 2 and "step" in told[-1], 180)
        cluster.run("jobs", "stop", run.id)
        assert followed.wait(60) == 1
    finally:
        machine.vanish()
        followed.kill()
    assert (run.read_result() or {})["status"] == "stopped"
    records = [record for record, _ in run.read_metrics()]
    assert worlds(records)[0] == 2
    at = 0
    for record in records:
        if record.get("event") == "resumed":
            assert record["step"] <= at
            at = record["step"]
        elif "event" not in record:
            assert record["step"] == at + 1  # each step follows the one before, at every size
            at = record["step"]
