from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from cluster.errors import JobError
from train_jobs import follow
from train_jobs.runs import RunDir, new_id

MOMENT = datetime(2026, 11, 22, 1, 1, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[2]


def test_a_run_id_says_what_and_when_and_is_new() -> None:
    assert new_id("demo-sft", MOMENT, "ab12") == "demo-sft-20261122-0101-ab12"
    assert re.fullmatch(r"my-file-\d{8}-\d{4}-[0-9a-f]{4}", new_id("My File!"))
    assert new_id("你好", MOMENT, "0").startswith("run-")
    assert len({new_id("a") for _ in range(20)}) > 10


def test_a_line_that_a_killed_rank_did_not_finish_is_cut_off(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.mend_metrics()
    run.append({"step": 1, "steps": 9})
    run.append({"event": "checkpoint", "step": 1})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "ste')
    assert (run.last_step() or {})["step"] == 1
    run.mend_metrics()
    run.append({"step": 2, "steps": 9})
    assert [record["step"] for record, _ in run.read_metrics()] == [1, 1, 2]
    assert (run.last_step() or {})["step"] == 2


def test_metrics_are_read_by_whole_lines_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert list(run.read_metrics()) == []
    run.append({"step": 1})
    with run.metrics.open("a") as file:
        file.write('{"step": 2')
    [(record, end)] = run.read_metrics()
    assert record["step"] == 1
    with run.metrics.open("a") as file:
        file.write("}\n")
    assert [record["step"] for record, _ in run.read_metrics(end)] == [2]
    assert run.metrics_end() == run.metrics.stat().st_size


def test_a_users_file_is_not_a_run() -> None:
    run = RunDir.create("x")
    assert RunDir.of(run.config) == run
    assert RunDir.of(Path("configs/train/demo-sft.yaml")) is None


class Scripted:
    """A job that writes a record at each look, then ends as told."""

    def __init__(self, run: RunDir, end: str, records: int = 2) -> None:
        self.run, self.end, self.left = run, end, records

    def state(self) -> follow.State:
        if self.left:
            self.left -= 1
            step = {"step": 2 - self.left, "steps": 2, "loss": 1.5, "tokens_per_s": 99.6}
            self.run.append({**step, "eta_s": 75.4})
            return "running"
        return "succeeded" if self.end == "succeeded" else "failed"

    def why(self) -> str:
        return f"run {self.run.id}: rank 1 failed: out of memory\nwhole log: /x/rank-1.log"

    def kill(self) -> None:
        self.left = 0

    def detach(self) -> None:
        return None


RESULT = {
    "status": "succeeded",
    "base": "m@1",
    "published": "m@2",
    "steps": 2,
    "tokens": 10,
    "tokens_per_s": 99.6,
    "seconds": 1.0,
    "heldout_loss_before": 2.0,
    "heldout_loss_after": 1.0,
}


def test_following_shows_each_step_and_what_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    run.finish(RESULT)
    assert follow.follow(run, Scripted(run, "succeeded")) == 0
    told = capsys.readouterr().out
    assert "step 1/2  loss 1.5000  100 tokens/s  1 min 15 s left" in told
    assert told.count("step ") == 2
    assert "2.0000 before, 1.0000 after" in told
    assert "m@2 (from m@1)" in told


def test_a_failed_run_names_itself_and_its_log(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(JobError, match=r"(?s)rank 1 failed: out of memory.*rank-1\.log"):
        follow.follow(run, Scripted(run, "failed"))
    assert (run.read_result() or {})["status"] == "failed"


def test_a_run_that_saved_before_its_job_was_ended_was_stopped(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.finish({**RESULT, "status": "stopped", "published": None})
    with pytest.raises(JobError, match="was stopped after step 2; nothing was published"):
        follow.follow(run, Scripted(run, "failed"))
    assert (run.read_result() or {})["status"] == "stopped"


def test_ctrl_c_asks_the_run_to_stop_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)

    class Interrupted(Scripted):
        def state(self) -> follow.State:
            if not self.run.stop.exists():
                raise KeyboardInterrupt
            self.run.finish({**RESULT, "status": "stopped", "published": None})
            return "succeeded"

    with pytest.raises(JobError, match="was stopped after step 2; nothing was published"):
        follow.follow(run, Interrupted(run, "succeeded"))
    assert "stopping run" in capsys.readouterr().err


def test_tc34_neither_the_command_line_nor_the_driver_loads_torch() -> None:
    code = (
        "import sys, os\n"
        "import cluster.cli, train_jobs.cli, train_jobs.finetune, train_jobs.follow\n"
        "import train_jobs.plan, train_jobs.task, train_jobs.local, train_jobs.resume\n"
        "import train_jobs.jobs, train_jobs.jobs_cli, train_jobs.data_cli, train_jobs.attempts\n"
        "assert 'ray' not in sys.modules, 'ray'\n"
        "import train_jobs.launch\n"
        "from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer\n"
        "from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError\n"
        "print(*sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


def test_what_ray_pickles_is_a_reference() -> None:
    import ray.cloudpickle as cloudpickle

    from train_jobs.worker import train

    assert len(cloudpickle.dumps(train)) < 200


def test_a_rank_dies_with_the_command_that_started_it(tmp_path: Path) -> None:
    rank = "from train_jobs.local import die_with_parent; die_with_parent(); "
    rank += "print(1, flush=True); import time; time.sleep(60)"
    starter = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); import time; time.sleep(60)\n"
    )
    command = [sys.executable, "-c", starter]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the rank outlived its parent"
        time.sleep(0.05)
