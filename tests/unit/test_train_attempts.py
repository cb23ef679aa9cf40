"""Who may work on a run, and what `jobs` and `--resume` say of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import load
from cluster.errors import ClusterError, ConfigError, JobError, NotEnough
from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.unit.test_train_checkpoint import written
from train_jobs import attempts, checkpoint, export, finetune, jobs, jobs_cli, ray_rank, resume
from train_jobs.config import FinetuneConfig
from train_jobs.launch import cause
from train_jobs.progress import START
from train_jobs.runs import RunDir, every
from train_jobs.verbs import complete_run
from train_jobs.watch import Lost, accuse, claim, ended, wrong

ROOT = Path(__file__).resolve().parents[2]
FIELDS: dict[str, Any] = {
    "model": "tiny@1",
    "data": {"train": "/toy.jsonl"},
    "batch": {"total": 4},
    "run": {"workers": 2, "steps": 9},
}
HOLD = """
import sys, time
from pathlib import Path
from train_jobs import attempts
from train_jobs.runs import RunDir, every
run = RunDir(Path(sys.argv[1]))
with attempts.claim(run), attempts.writer(run, 0):
    print("held", flush=True)
    time.sleep(60)
"""
Holder = Callable[[RunDir], "subprocess.Popen[str]"]


@pytest.fixture
def run() -> RunDir:
    made = RunDir.create("toy")
    made.config.write_text(FinetuneConfig.model_validate(FIELDS).model_dump_json())
    return made


@pytest.fixture
def hold() -> Iterator[Holder]:
    """Start a process that drives a run."""
    started: list[subprocess.Popen[str]] = []

    def start(run: RunDir) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(run.path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def none(name: str) -> None:
    return None


def test_tc12_no_two_attempts_have_one_name(run: RunDir) -> None:
    made = [attempts.begin(run, lambda name: name) for _ in range(3)]
    names = [attempt.name(run) for attempt in made]
    assert names == [run.id, f"{run.id}-r2", f"{run.id}-r3"]
    assert [attempt.submission for attempt in made] == names
    assert attempts.history(run) == made


def test_a_new_attempt_puts_the_old_result_aside_and_forgets_a_stop(run: RunDir) -> None:
    attempts.begin(run, none)
    run.finish({"status": "stopped", "steps": 4})
    run.stop.touch()
    attempts.begin(run, none)
    assert run.read_result() is None
    assert not run.stop.exists()
    assert "stopped" in (run.path / "attempts" / "1.result").read_text()


def test_tc12_a_run_is_started_once(run: RunDir) -> None:
    first = attempts.begin(run, lambda name: name)
    assert attempts.join(run, run.id, resume=False) == first  # the job that was submitted for it
    with pytest.raises(JobError, match=f"was started before .* --resume {run.id}"):
        attempts.join(run, "somebody-elses", resume=False)
    assert attempts.join(run, "raysubmit_x", resume=True).number == 2


def test_t41_a_run_has_one_driver_and_its_end_frees_it(run: RunDir, hold: Holder) -> None:
    assert not attempts.is_driven(run)
    process = hold(run)
    assert attempts.is_driven(run)
    with pytest.raises(JobError, match=rf"still running \(process {process.pid} on "):
        attempts.claim(run).__enter__()
    with pytest.raises(JobError, match="still running"):
        resume.require_resumable(run)
    process.kill()  # not even time to clean up
    process.wait()
    assert not attempts.is_driven(run)
    with attempts.claim(run):
        assert attempts.is_driven(run)


def test_a_second_rank_0_waits_for_the_first_and_not_for_ever(
    run: RunDir, hold: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(run)
    monkeypatch.setattr(attempts, "WRITER_S", 0.3)
    with pytest.raises(JobError, match="another rank 0 still holds"):
        attempts.writer(run, 0).__enter__()
    with attempts.writer(run, 1):  # only rank 0 writes
        pass


def test_resuming_what_has_succeeded_or_saved_nothing_is_refused(run: RunDir) -> None:
    with pytest.raises(JobError, match=r"has no whole checkpoint in .*save_every"):
        resume.require_resumable(run)
    path = written(run.checkpoints, 3)
    assert resume.require_resumable(run) == path
    (path / "COMPLETE").unlink()
    with pytest.raises(JobError, match=r"\(step-00000003: no COMPLETE marker\)"):
        resume.require_resumable(run)
    run.finish({"status": "succeeded", "published": "tiny@2"})
    with pytest.raises(JobError, match=r"has succeeded and published tiny@2; .*model: tiny@2"):
        resume.require_resumable(run)


def test_an_unknown_run_names_the_newest(run: RunDir) -> None:
    with pytest.raises(ConfigError, match=f"no run 'toi'; the newest are {run.id}"):
        RunDir.find("toi")
    assert RunDir.find(run.id) == run


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give either CONFIG"),
        (["a.yaml", "--resume", "x"], "give either CONFIG"),
        (["--resume", "x", "--set", "zero=0"], "--set zero=0 with --resume"),
        (["--resume", "x", "--set", "run.seed=3"], "--set run.seed=3 with --resume"),
        (["--resume", "x", "--set", "run.workers=1"], "no run 'x'"),
        (["--resume", "x", "--set", "run.stall_s=900"], "no run 'x'"),
        (["--resume", "x"], "no run 'x'"),
    ],
)
def test_what_the_entrypoint_cannot_mean_is_told(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main(arguments) == 1
    assert told in capsys.readouterr().err


def test_tc12_what_decides_nothing_that_is_learnt_may_change_and_stays(run: RunDir) -> None:
    asked = ["run.stall_s=900", "run.diverge=null", "publish.name=other", "run.workers=1"]
    before = load(run.config, FinetuneConfig)
    config = resume.config_of(run, None, asked)
    resume.store(run, config)
    stored = load(run.config, FinetuneConfig)
    assert (stored.run.stall_s, stored.run.diverge, stored.publish.name) == (900, None, "other")
    assert (config.run.workers, stored.run.workers) == (1, before.run.workers)
    wrote, now = (one.model_dump(mode="json") for one in (before, stored))
    meta = checkpoint.Meta(START, 2, 2, wrote)
    checkpoint.check(run.checkpoints, meta, now)
    now["optim"]["lr"] = 1.0
    with pytest.raises(JobError, match=r"optim.lr was [^;]*, is 1.0; put"):
        checkpoint.check(run.checkpoints, meta, now)


def test_a_new_attempt_forgets_why_the_one_before_ended(run: RunDir) -> None:
    run.pulses.mkdir()
    claim(run.pulses, "no progress")
    accuse(run.pulses, 1, "a reward broke")
    accuse(run.pulses, 0, "came later")
    assert wrong(run.pulses) == (1, "a reward broke")
    assert cause(run, RuntimeError("lost")) == f"run {run.id}: rank 1 failed: a reward broke"
    attempts.begin(run, lambda _: None)
    assert wrong(run.pulses) is ended(run.pulses) is None


@pytest.fixture
def worker(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], Any]:
    """Return what makes this process rank 0 of two under Ray Train, and its life end so."""
    place = {"get_world_rank": 0, "get_world_size": 2, "get_local_rank": 0}
    context = SimpleNamespace(
        **{name: lambda value=value: value for name, value in place.items()},
        get_local_world_size=lambda: 2,
    )
    parts = {
        "ray": SimpleNamespace(
            train=SimpleNamespace(get_context=lambda: context),
            util=SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1"),
        ),
        "ray.train.collective": SimpleNamespace(broadcast_from_rank_zero=lambda told: told),
    }
    for name in ("ray", "ray.train", "ray.util", "ray.train.collective"):
        monkeypatch.setitem(sys.modules, name, parts.get(name, SimpleNamespace()))

    def end(error: Exception) -> Any:
        def live(*_: Any) -> None:
            raise error

        monkeypatch.setattr(ray_rank, "run_rank", live)
        return ray_rank.main({"run": str(run.path), "revision": None, "resume": False})

    return end


def test_what_one_rank_finds_wrong_is_the_result_of_all(
    run: RunDir, worker: Callable[[Exception], Any]
) -> None:
    """An exception would be tried again by Ray Train; the one of a rank that is lost should be."""
    lost = Lost("lost contact with rank 1")
    with pytest.raises(Lost):
        worker(lost)
    told = worker(ConfigError("no reward f"))
    assert told == {"status": "failed", "error": f"run {run.id}: rank 0 failed: no reward f"}
    accuse(run.pulses, 1, "a reward broke")
    told = worker(lost)
    assert told == {"status": "failed", "error": f"run {run.id}: rank 1 failed: a reward broke"}


def test_a_model_that_cannot_be_published_is_not_lost(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(tensors: Any, base: Path, target: Path, rank: int) -> None:
        target.mkdir()
        (target / "model.safetensors").write_text("weights")

    def refuse(*_: Any, **__: Any) -> None:
        raise NotEnough("disk: 3 bytes are free")

    monkeypatch.setattr(export, "write_model", write)
    monkeypatch.setattr(export, "live_tensors", lambda model: {})
    monkeypatch.setattr(Library, "publish", refuse)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2, module=None)
    base, staging = SimpleNamespace(path=run.path), run.path / "export"
    told = rf"3 bytes are free\); it is whole in {staging}: .* models import {staging} --name toy"
    with pytest.raises(JobError, match=told):
        export.publish(engine, base, "toy", staging, Facts(), 0, adapter=False)  # type: ignore[arg-type]
    assert (staging / "model.safetensors").is_file()


def test_a_failure_is_told_where_it_cannot_be_written(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run.result.with_suffix(".partial").mkdir()
    run.fail("the loss is nan")
    assert run.read_result() is None
    assert "the run failed: the loss is nan" in capsys.readouterr().err
    run.pulses.write_text("in the way")
    accuse(run.pulses, 1, "a reward broke")
    assert "rank 1 failed: a reward broke" in capsys.readouterr().err


def test_tc09_resume_rehearses_with_another_number_of_ranks_too(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    written(run.checkpoints, 5)
    before = sorted(run.path.rglob("*"))
    assert finetune.main(["--resume", run.id, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "attempt 1 would go on after step 5 (100 tokens in 2 s so far)" in told
    assert f"-- python -m train_jobs.finetune --resume {run.id}" in told
    assert sorted(run.path.rglob("*")) == before
    fewer = ["--resume", run.id, "--dry-run", "--set", "run.workers=1"]
    assert finetune.main(fewer) == 0
    told = capsys.readouterr().out
    assert "with 1 rank (2 wrote the checkpoint), ZeRO 2" in told
    assert f"--resume {run.id} --set run.workers=1" in told
    assert finetune.main([*fewer[:-1], "run.workers={min: 1, max: 2}"]) == 0
    assert "with 1 to 2 ranks (2 wrote" in capsys.readouterr().out
    assert finetune.main(["--resume", run.id, "--local", "3"]) == 1
    told = capsys.readouterr().err
    assert "batch.total=4 is not a multiple of batch.micro * run.workers = 1 * 3" in told


def test_the_list_knows_each_state(run: RunDir, hold: Holder) -> None:
    attempts.begin(run, lambda name: name)
    assert jobs.state_of(run, {}) == "lost"
    assert jobs.state_of(run, {run.id: "PENDING"}) == "waiting"
    process = hold(run)
    run.append({"step": 4, "steps": 9, "loss": 1.25})
    written(run.checkpoints, 4)
    row = jobs.overview(run, {})
    assert (row["state"], row["step"], row["loss"], row["checkpoint"]) == ("running", 4, 1.25, 4)
    assert row["started"]
    process.kill()
    process.wait()
    run.finish({"status": "failed"})
    assert jobs.overview(run, {run.id: "FAILED"})["state"] == "failed"


def test_stopping_waits_for_the_checkpoint(run: RunDir, hold: Holder) -> None:
    attempts.begin(run, none)
    process = hold(run)
    told = jobs.stop(run, None, limit_s=20)
    assert "saves a checkpoint" in next(told)
    assert run.stop.exists()
    written(run.checkpoints, 4)
    run.append({"step": 4, "steps": 9})
    run.finish({"status": "stopped", "steps": 4})
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert list(told)[-1] == (
        f"run {run.id}: stopped after step 4\ngo on from step 4: roundhouse train --resume {run.id}"
    )


def test_stopping_ends_by_force_what_does_not_answer(run: RunDir, hold: Holder) -> None:
    attempts.begin(run, none)
    process = hold(run)
    told = list(jobs.stop(run, None, limit_s=0.2))
    assert "it did not stop within 0 s and is ended now" in told
    assert process.wait(10) == -signal.SIGTERM
    assert (run.read_result() or {})["status"] == "failed"
    with pytest.raises(JobError, match="does not run: failed"):
        list(jobs.stop(run, None, limit_s=1))


def test_a_run_on_another_machine_is_not_ended_from_here(run: RunDir) -> None:
    (run.path / "lock").write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere"}))
    with pytest.raises(JobError, match="of elsewhere; end it there"):
        attempts.terminate(run)


def test_the_logs_of_plain_processes_are_their_files(run: RunDir) -> None:
    def no_cluster() -> Any:
        raise AssertionError("plain processes have no cluster")

    with pytest.raises(JobError, match="never started"):
        jobs.log_of(run, no_cluster)
    attempts.begin(run, none)
    for rank in range(2):
        (run.path / f"rank-{rank}.log").write_text(f"I am {rank}")
    log = jobs.log_of(run, no_cluster)
    assert log == "==> rank-0.log <==\nI am 0\n==> rank-1.log <==\nI am 1\n"


def test_runs_are_listed_newest_first(run: RunDir) -> None:
    later = RunDir.create("later")
    later.config.write_text("{}")
    os.utime(later.config, (time.time() + 5, time.time() + 5))
    assert every() == [later, run]
    assert complete_run("l") == [later.id]


class FakeCluster:
    """A cluster's answers about jobs, and what it was asked to do."""

    def __init__(self, run: RunDir, status: str) -> None:
        self.run, self.status, self.asked = run, status, list[tuple[str, str]]()
        self.logs = iter(["one\n", "one\ntwo\n", "one\ntwo\nthree\n"])

    def json(self, method: str, path: str, **_: Any) -> Any:
        self.asked.append((method, path))
        if path.endswith("/logs"):
            return {"logs": next(self.logs)}
        return [{"submission_id": self.run.id, "status": self.status}, {"submission_id": None}]

    def http(self, method: str, path: str, **_: Any) -> None:
        self.asked.append((method, path))
        self.status = "STOPPED"


def test_a_job_that_waits_is_ended_over_the_clusters_interface(run: RunDir) -> None:
    attempts.begin(run, lambda name: name)
    cluster: Any = FakeCluster(run, "PENDING")
    told = list(jobs.stop(run, cluster, limit_s=0.2))
    assert ("POST", f"/api/jobs/{run.id}/stop") in cluster.asked
    assert told[-1] == f"run {run.id}: failed after step 0"


def test_following_a_log_prints_only_what_is_new(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts.begin(run, lambda name: name)
    cluster: Any = FakeCluster(run, "RUNNING")
    monkeypatch.setattr(jobs_cli, "find_cluster", lambda required: cluster)
    states = iter(["RUNNING", "RUNNING", "SUCCEEDED"])
    monkeypatch.setattr(jobs_cli, "_statuses", lambda: {run.id: next(states)})
    monkeypatch.setattr(jobs_cli, "FOLLOW_S", 0.0)
    jobs_cli.show_logs(run.id, follow=True)
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    with pytest.raises(ConfigError, match="--follow prints lines"):
        jobs_cli.show_logs(run.id, follow=True, as_json=True)


def test_a_log_that_went_with_its_cluster_leaves_the_runs_own_words(run: RunDir) -> None:
    attempts.begin(run, lambda name: name)
    run.append({"event": "published", "ref": "tiny@2"})

    def gone() -> Any:
        raise ClusterError("no cluster runs")

    with pytest.raises(JobError, match=r"(?s)no cluster runs.*published tiny@2"):
        jobs.log_of(run, gone)
