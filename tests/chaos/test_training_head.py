"""The whole cluster dies under a run; a new one goes on with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.library.store import Library
from tests.ray.cluster_fixtures import ROOT, Rig, discard, new_rig
from tests.ray.test_training import write_config
from train_jobs.runs import RunDir

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A cluster that nobody else uses."""
    rig = new_rig()
    monkeypatch.setenv("HOME", rig.env["HOME"])
    monkeypatch.setenv("ROUNDHOUSE_HOME", rig.env["ROUNDHOUSE_HOME"])
    try:
        yield rig.up()
    finally:
        discard(rig)


def kill_head(rig: Rig) -> None:
    """Kill the head's own processes and all below them, none of which may clean up."""
    heads = [psutil.Process(told["pid"]) for told in rig.cluster.processes]
    below = [child for head in heads for child in head.children(recursive=True)]
    for process in {*heads, *below}:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    psutil.wait_procs([*heads, *below], timeout=20)


def test_t41_a_killed_head_is_started_anew_and_the_run_ends_as_it_would_have(
    mine: Rig, tmp_path: Path
) -> None:
    run_fields = {"steps": 40, "save_every": 4, "threads": 1}
    config = write_config(mine, tmp_path, run_fields, publish={"name": "head-killed"})
    ran = mine.run("train", str(config), "--local", "2", "--json", timeout_s=400)
    unkilled = json.loads(ran.stdout)
    before = set((mine.home / "runs").glob("*"))
    with subprocess.Popen(
        mine.command("train", str(config)),
        cwd=ROOT,
        env=mine.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as followed:
        deadline = time.monotonic() + 300
        while True:
            runs = [RunDir(path) for path in set((mine.home / "runs").glob("*")) - before]
            if runs and (runs[0].last_step() or {}).get("step", 0) >= 10:
                break
            assert followed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill_head(mine)
        assert followed.wait(120) == 1
    [run] = runs
    assert (run.last_step() or {})["step"] < 40
    mine.up()
    told = mine.run("train", "--resume", run.id, timeout_s=400).stdout
    assert "resumed from the checkpoint of step " in told
    result = run.read_result() or {}
    library = Library(mine.home / "library")
    digests = [library.verify(one["published"]).manifest.digest for one in (result, unkilled)]
    assert digests[0] == digests[1]  # to the bit
