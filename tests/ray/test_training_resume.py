"""A killed rank, a killed job: the run goes on and ends with the weights it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import JobError
from cluster.library.store import Library
from tests.ray.cluster_fixtures import ROOT, Rig
from tests.ray.test_training import write_config
from train_jobs import attempts, resume
from train_jobs.runs import RunDir

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
STEPS, EVERY, KILL_AT = 48, 4, 14
RUN = {"steps": STEPS, "save_every": EVERY, "threads": 1, "max_failures": 1}


def config(cluster: Rig, folder: Path, steps: int = STEPS) -> Path:
    # a name of its own: no other test counts these versions
    return write_config(cluster, folder, RUN | {"steps": steps}, publish={"name": "train-killed"})


@pytest.fixture(scope="module")
def unkilled(cluster: Rig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same run, never killed: two plain processes."""
    path = config(cluster, tmp_path_factory.mktemp("unkilled"))
    ran = cluster.run("train", str(path), "--local", "2", "--json", timeout_s=120)
    result: dict[str, Any] = json.loads(ran.stdout)
    assert result["steps"] == STEPS
    return result | {"digest": digest(cluster, result)}


def digest(cluster: Rig, result: dict[str, Any]) -> str:
    """Identity of the published files: equal to the bit or not."""
    return Library(cluster.home / "library").verify(result["published"]).manifest.digest


@pytest.fixture
def training(
    cluster: Rig, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[subprocess.Popen[str], RunDir]]:
    """A run on the cluster, of ``STEPS`` steps or as many as a test says, and who follows it.

    It is past step ``KILL_AT``, and what it saved before that lies there.
    """
    before = set((cluster.home / "runs").glob("*"))
    steps = getattr(request, "param", STEPS)
    command = cluster.command("train", str(config(cluster, tmp_path, steps)))
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=cluster.env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as followed:
        try:
            deadline = time.monotonic() + 120
            while True:
                runs = [RunDir(p) for p in set((cluster.home / "runs").glob("*")) - before]
                if (
                    runs
                    and (runs[0].last_step() or {}).get("step", 0) >= KILL_AT
                    and saved(runs[0]) >= KILL_AT - EVERY
                ):
                    break
                assert followed.poll() is None, followed.communicate()[0]
                assert time.monotonic() < deadline, "the run did not begin"
                time.sleep(0.02)
            yield followed, runs[0]
        finally:
            followed.kill()


def saved(run: RunDir) -> int:
    """Return the step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in run.checkpoints.glob("step-*")), default=0)


def holder(lock: Path) -> int:
    return int(json.loads(lock.read_text())["pid"])


def kill_holder(lock: Path) -> None:
    os.kill(holder(lock), signal.SIGKILL)


def records(run: RunDir) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the steps in the order they were done, and the events."""
    all_of = [record for record, _ in run.read_metrics()]
    steps = [record["step"] for record in all_of if "event" not in record]
    return steps, [record for record in all_of if "event" in record]


def assert_same(
    cluster: Rig, run: RunDir, result: dict[str, Any], unkilled: dict[str, Any]
) -> None:
    assert (result["status"], result["steps"]) == ("succeeded", STEPS)
    assert digest(cluster, result) == unkilled["digest"]  # every weight, to the bit
    same = ("tokens", "trained_tokens", "loss", "heldout_loss_before", "heldout_loss_after")
    assert {key: result[key] for key in same} == {key: unkilled[key] for key in same}
    steps, events = records(run)
    evaluated = [event["when"] for event in events if event["event"] == "evaluated"]
    assert evaluated == ["before", "after"]  # once each, over all attempts
    assert set(steps) == set(range(1, STEPS + 1))
    assert len(list(run.checkpoints.glob("step-*"))) == 2  # run.keep


def test_t41_tc07_a_killed_rank_is_replaced_and_the_weights_are_the_same(
    cluster: Rig, unkilled: dict[str, Any], training: tuple[subprocess.Popen[str], RunDir]
) -> None:
    followed, run = training
    kill_holder(run.path / "writing")  # rank 0
    told, _ = followed.communicate(timeout=150)
    assert followed.returncode == 0, told
    result = run.read_result() or {}
    assert_same(cluster, run, result, unkilled)
    [resumed] = [event for event in records(run)[1] if event["event"] == "resumed"]
    assert resumed["step"] >= KILL_AT - EVERY
    assert resumed["step"] % EVERY == 0
    assert f"resumed from the checkpoint of step {resumed['step']}" in told
    assert result["resumed_from"] == resumed["step"]
    assert len(attempts.history(run)) == 1  # one job all the while


def test_t41_t42_a_killed_job_is_resumed_past_a_torn_checkpoint(
    cluster: Rig, unkilled: dict[str, Any], training: tuple[subprocess.Popen[str], RunDir]
) -> None:
    followed, run = training
    with pytest.raises(JobError, match=f"run {run.id} is still running"):
        resume.require_resumable(run)  # a command would take as long as the run has left
    writer = psutil.Process(holder(run.path / "writing"))
    kill_holder(run.path / "lock")  # the driver
    told, _ = followed.communicate(timeout=60)
    assert followed.returncode == 1
    writer.wait(60)  # rank 0 ends a little later, and may save until then
    assert f"roundhouse train --resume {run.id}" in told

    newest = max(run.checkpoints.glob("step-*"))
    part = max((newest / "state").iterdir(), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:-1] + b"x")  # only its hash shows it

    told = cluster.run("train", "--resume", run.id, timeout_s=150).stdout
    assert f"passed over as torn: {newest.name}: state/{part.name} differs" in told
    assert_same(cluster, run, run.read_result() or {}, unkilled)
    first, second = attempts.history(run)
    assert (first.submission, second.submission) == (run.id, f"{run.id}-r2")
    assert sorted(os.listdir(run.path / "ray")) == [run.id, f"{run.id}-r2"]

    listed = json.loads(cluster.run("jobs", "list", "--json").stdout)["runs"]
    [row] = [row for row in listed if row["run"] == run.id]
    assert (row["state"], row["step"], row["attempts"]) == ("succeeded", STEPS, 2)
    again = cluster.run("train", "--resume", run.id, check=False)
    assert again.returncode == 1
    assert "has succeeded and published" in again.stderr
    assert f"run {run.id}: " in cluster.run("jobs", "logs", run.id).stdout


@pytest.mark.parametrize("training", [5_000], indirect=True)
def test_t41_ray_job_stop_saves_first(
    cluster: Rig, training: tuple[subprocess.Popen[str], RunDir]
) -> None:
    followed, run = training
    cluster.cluster.http("POST", f"/api/jobs/{run.id}/stop")
    told, _ = followed.communicate(timeout=90)
    assert followed.returncode == 1
    result = run.read_result() or {}
    assert result["status"] == "stopped", told
    [*_, newest] = sorted(run.checkpoints.glob("step-*"))
    assert newest.name == f"step-{result['steps']:08d}"
    assert result["steps"] < 5_000


def test_tc33_what_says_that_a_node_is_drained_is_where_it_was() -> None:
    from ray.train.v2._internal.execution import context, preemption

    assert "preemption_context" in context.TrainContext.__dataclass_fields__
    assert preemption.PreemptionContext().preemption_info is None
    assert callable(context.get_train_context)
