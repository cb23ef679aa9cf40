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

from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.parity.engine_fixtures import save_tiny
from tests.unit.text_fixtures import write_tokenizer
from train_jobs import attempts
from train_jobs.runs import RunDir

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]
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
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, out + err
    return out + err


def wait_for_step(run: RunDir, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while (run.last_step() or {}).get("step", 0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_run(known: set[Path], process: subprocess.Popen[str]) -> RunDir:
    deadline = time.monotonic() + 60
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
            timeout=90,
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
