"""How a rank of plain processes ends: by what it did, not by how its libraries come apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from train_jobs.local import LocalRanks
from train_jobs.runs import RunDir


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_rank_that_is_done_does_not_fail_while_the_interpreter_ends() -> None:
    aborts = "import atexit, os; atexit.register(os.abort); from train_jobs.local import end; "
    ended = run(aborts + "print('told'); end(3)")
    assert (ended.returncode, ended.stdout) == (3, "told\n")
    assert run(aborts + "print('told')").returncode == -6  # what it is spared


def test_a_rank_ended_by_a_signal_is_told_with_its_last_words(tmp_path: Path) -> None:
    with (tmp_path / "rank-0.log").open("wb") as log:
        rank = subprocess.Popen(
            [sys.executable, "-c", "import os; print('so far', flush=True); os.abort()"],
            stdout=log,
            stderr=log,
        )
    rank.wait(60)
    ranks = LocalRanks(RunDir(tmp_path), [rank])
    assert ranks.state() == "failed"
    assert "rank 0 failed: it was ended by SIGABRT" in ranks.why()
    assert "its last words: so far" in ranks.why()
