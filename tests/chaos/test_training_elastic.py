"""A machine leaves the cluster under a run, and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import home
from cluster.session import IN_JOB
from tests.ray.cluster_fixtures import ROOT
from tests.ray.test_training import write_config
from train_jobs.runs import RunDir

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
CPUS = 6
"""Of each rank: the head holds one, and so does the second machine."""


@pytest.fixture
def machines() -> Iterator[Any]:
    """A cluster of Ray's own kind: nobody joins one on loopback, as `roundhouse up` starts it."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS + 1})
    yield made
    made.shutdown()


def wait(run: RunDir, until: Callable[[list[dict[str, Any]]], bool]) -> None:
    deadline = time.monotonic() + 480
    while not until([record for record, _ in run.read_metrics()]):
        assert run.read_result() is None, run.read_result()
        assert time.monotonic() < deadline, list(run.read_metrics())[-3:]
        time.sleep(0.2)


def worlds(records: list[dict[str, Any]]) -> list[int]:
    return [record["world"] for record in records if record.get("event") == "ready"]


def test_tc11_a_node_leaves_and_returns_and_no_row_is_lost_or_repeated(
    machines: Any, tmp_path: Path
) -> None:
    elastic = {"workers": {"min": 1, "max": 2}, "resize_s": 5, "num_cpus": CPUS, "threads": 1}
    limits = {"steps": 4000, "save_every": 4, "max_failures": 3, "timeout_s": 30}
    rig = cast(Any, SimpleNamespace(home=home.home()))
    config = write_config(rig, tmp_path, {**elastic, **limits})
    second = machines.add_node(num_cpus=CPUS)
    machines.wait_for_nodes()
    followed = subprocess.Popen(
        [sys.executable, "-m", "train_jobs.finetune", str(config)],
        cwd=ROOT,
        # the driver of a job, as far as it can tell
        env={**os.environ, "RAY_ADDRESS": machines.address, IN_JOB: "{}"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (made := list(home.runs_dir().glob("*/config.json"))):
            assert followed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run = RunDir(made[0].parent)
        wait(run, lambda told: worlds(told) == [2] and len(told) > 12)
        machines.remove_node(second, allow_graceful=False)
        wait(run, lambda told: worlds(told)[-1] == 1 and "event" not in told[-1])
        machines.add_node(num_cpus=CPUS)
        wait(run, lambda told: worlds(told)[-1] == 2 and "event" not in told[-1])
        run.stop.touch()
        assert followed.wait(120) == 0
    finally:
        followed.kill()
        followed.wait()
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
