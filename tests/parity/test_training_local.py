"""A run as plain processes: stopped, killed and resumed, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import dump
from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.parity.engine_fixtures import save_tiny
from tests.unit.text_fixtures import write_tokenizer
from train_jobs import attempts
from train_jobs.checkpoint import newest
from train_jobs.group import free_address
from train_jobs.plan import resolve
from train_jobs.runs import RunDir

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 40


@pytest.fixture
def config(tmp_path: Path) -> Path:
    source = save_tiny(tmp_path / "base", vocab_size=400)
    write_tokenizer(source)
    Library().publish("tiny", source, Facts())
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"where is engine {number}"},
                {"role": "assistant", "content": f"in stall {number % 3}"},
            ]
        }
        for number in range(24)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "tiny.yaml"
    fields = {
        "model": "tiny@1",
        "data": {"train": "train.jsonl", "heldout": "train.jsonl", "max_len": 128},
        "adapter": {"kind": "lora", "r": 4, "dropout": 0.1},
        "optim": {"lr": 1e-2},
        "batch": {"total": 4},
        "run": {"workers": 1, "steps": STEPS, "save_every": 4, "keep": 1, "threads": 1},
    }
    path.write_text(yaml.safe_dump(fields))
    return path


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    return out + err


def wait_for_step(run: RunDir, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while (run.last_step() or {}).get("step", 0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_run(known: set[Path], process: subprocess.Popen[str]) -> RunDir:
    deadline = time.monotonic() + 240
    while not (fresh := set((Path(os.environ["ROUNDHOUSE_HOME"]) / "runs").glob("*")) - known):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return RunDir(fresh.pop())


def test_t41_stopped_then_killed_then_resumed_is_the_run_never_touched(config: Path) -> None:
    unkilled: dict[str, Any] = json.loads(
        subprocess.run(
            [sys.executable, "-m", "cluster.cli", "train", str(config), "--local", "1", "--json"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            timeout=240,
        ).stdout
    )
    process = start("train", str(config), "--local", "1")
    run = wait_for_run({Path(unkilled["path"])}, process)
    wait_for_step(run, 6, process)
    stopped = finish(start("jobs", "stop", run.id))
    told = finish(process, code=1)
    at = (run.read_result() or {})["steps"]
    assert f"run {run.id}: stopped after step {at}\ngo on from step {at}: " in stopped
    assert f"was stopped after step {at}; nothing was published" in told
    assert 6 <= at < STEPS

    rows = config.with_name("train.jsonl")
    good = rows.read_text()
    rows.write_text(good.replace("engine 7", "engine 9"))
    told = finish(start("train", "--resume", run.id, "--local", "1"), code=1)
    assert "was written with other data: train.jsonl has other content (SHA-256 " in told
    rows.write_text(good)

    process = start("train", "--resume", run.id, "--local", "1")
    wait_for_step(run, at + 6, process)
    process.send_signal(signal.SIGKILL)  # whoever follows: the rank ends with it
    process.wait()
    deadline = time.monotonic() + 30
    while attempts.is_driven(run):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    told = finish(start("train", "--resume", run.id, "--local", "1"))
    resumed = [r["step"] for r, _ in run.read_metrics() if r.get("event") == "resumed"]
    assert resumed[0] == at
    assert resumed[1] > at
    assert f"resumed from the checkpoint of step {resumed[1]}" in told
    result = run.read_result() or {}
    same = ("steps", "tokens", "trained_tokens", "loss", "heldout_loss_after")
    assert {key: result[key] for key in same} == {key: unkilled[key] for key in same}
    library = Library()
    ours, theirs = (library.verify(r["published"]).manifest for r in (result, unkilled))
    assert ours.digest == theirs.digest  # to the bit
    assert ours.notes[-1] == "LoRA merged: r=4, alpha=32, targets=all-linear"
    assert result["train_seconds"] > 0
    assert len(attempts.history(run)) == 3
    assert len(list(run.checkpoints.glob("step-*"))) == 1


KILLED = """
import os, signal, sys
left = int(sys.argv[1])
def deadly(plain):
    def call(*args, **more):
        global left
        if ".step-" in str(args[-1]) or ".step-" in str(args[0]):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **more)
    return call
from pathlib import Path
import train_jobs.checkpoint, torch
torch.save = deadly(torch.save)
train_jobs.checkpoint._sync = deadly(train_jobs.checkpoint._sync)
os.replace = deadly(os.replace)
from train_jobs.local import main
sys.exit(main(sys.argv[2:]))
"""


def rank(run: RunDir, *more: str, killed_at: int = 0) -> int:
    """Be the only rank of a run, in a process that dies at its n-th write of a checkpoint."""
    address = free_address()
    command = [sys.executable, "-c", KILLED, str(killed_at), str(run.path), "0", "1", address]
    return subprocess.run([*command, *more], cwd=ROOT, timeout=240).returncode


def test_t42_killed_while_it_writes_a_checkpoint_it_ends_with_the_same_weights(
    config: Path,
) -> None:
    """Within DeepSpeed's files, between them and the seal, and within the seal's renames."""
    short = ["run.steps=6", "run.save_every=2", "adapter=null", "run.keep=1"]
    digests = []
    # a checkpoint is eleven of its writes: two files of DeepSpeed's first, the rename last
    for kills in ((), (13, 11)):
        run = RunDir.create("killed")
        run.config.write_text(dump(resolve(config, short)))
        for number, kill in enumerate(kills):
            assert rank(run, *["resume"] * bool(number), killed_at=kill) == -signal.SIGKILL
            found, passed = newest(run.checkpoints)
            assert found is not None
            assert not passed
        if kills:  # a rank by itself looks, too: nobody submits what a cluster starts anew
            rows = config.with_name("train.jsonl")
            good = rows.read_text()
            rows.write_text(good.replace("engine 7", "engine 9"))
            assert rank(run, "resume") == 1
            rows.write_text(good)
        assert rank(run, *["resume"] * bool(kills)) == 0
        result = run.read_result() or {}
        assert result["steps"] == 6
        assert len(list(run.checkpoints.iterdir())) == 1
        digests.append(Library().verify(result["published"]).manifest.digest)
    assert digests[0] == digests[1]  # to the bit


def test_tc11_a_preempted_run_saves_first_and_goes_on_with_one_rank_less(config: Path) -> None:
    """And publishes its best checkpoint, whoever wrote it."""
    looks = ["run.evaluate_every=2", "run.best={metric: loss}", "publish.which=best"]
    changes = [*looks, "run.steps=20", "run.save_every=10", "adapter=null", "zero=3"]
    sets = [word for change in changes for word in ("--set", change)]
    process = start("train", str(config), "--local", "2", *sets)
    run = wait_for_run(set(), process)
    wait_for_step(run, 3, process)
    pid = json.loads((run.path / "writing").read_text())["pid"]
    os.kill(pid, signal.SIGTERM)
    told = finish(process, code=1)
    at = (run.read_result() or {})["steps"]
    assert f"was stopped after step {at}; nothing was published" in told
    assert 3 <= at < 20

    told = finish(start("train", "--resume", run.id, "--set", "run.workers=1", "--local", "1"))
    assert f"resumed from the checkpoint of step {at}, written by 2 ranks, with 1" in told
    records = [record for record, _ in run.read_metrics()]
    steps = [record["step"] for record in records if "event" not in record]
    assert steps == list(range(1, 21))  # no step twice, none left out
    result = run.read_result() or {}
    during = [r for r in records if r.get("event") == "evaluated" and "at" in r["when"]]
    least = min(during, key=lambda record: record["loss"])
    assert least["when"] == f"at step {result['published_step']}"
    assert result["heldout_loss_after"] == pytest.approx(least["loss"], rel=1e-5)
    assert not run.reshaped.exists()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_tc29_a_silent_rank_is_named_with_its_step(config: Path, how: signal.Signals) -> None:
    sets = ["--set", "run.stall_s=5", "--set", "run.steps=2000"]
    process = start("train", str(config), "--local", "2", *sets)
    run = wait_for_run(set(), process)
    wait_for_step(run, 3, process)
    pid = json.loads((run.pulses / "1.json").read_text())["pid"]
    os.kill(pid, how)
    told = finish(process, code=1)
    if how is signal.SIGSTOP:
        assert "no progress for 5 s (run.stall_s): rank 1 (process " in told
    else:  # whoever of the two is seen to end first
        named = f"lost contact with rank 1 (process {pid} on "
        assert named in told or "rank 1 failed: it was ended by SIGKILL" in told
    assert (run.read_result() or {})["status"] == "failed"


@pytest.mark.parametrize("zero", [2, 3])
def test_the_best_checkpoint_is_what_is_published(config: Path, zero: int) -> None:
    """The last step has none: the engine is built anew for it."""
    changes = ["adapter=null", f"zero={zero}", "run.steps=10", "publish.which=best"]
    looks = ["run.evaluate_every=4", "run.best.metric=loss", "run.keep=2"]
    asked = [word for one in (*changes, *looks) for word in ("--set", one)]
    told = json.loads(finish_json(start("train", str(config), "--local", "1", "--json", *asked)))
    records = [record for record, _ in RunDir(Path(told["path"])).read_metrics()]
    seen = {
        record["when"]: record["loss"] for record in records if record.get("event") == "evaluated"
    }
    best = min(("step 4", "step 8"), key=lambda when: seen[f"at {when}"])
    assert told["published_step"] == int(best.removeprefix("step "))
    assert seen["after"] == pytest.approx(seen[f"at {best}"], rel=1e-6)


def finish_json(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return out
