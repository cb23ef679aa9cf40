"""The ranks of one side: plain processes that run this project's benchmarks as modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.env import ROOT
from benchmarks.harness import REPLY


def run_ranks(
    module: str, options: Sequence[str], ranks: int, env: Mapping[str, str], bound_s: float
) -> list[dict[str, Any]]:
    """Run ``python -m module OPTIONS --place HOST:PORT/RANK`` for each rank; return the replies.

    Raises RuntimeError with the ranks' last words when there is no reply, and
    subprocess.TimeoutExpired after ``bound_s`` seconds. No process stays.
    """
    from train_jobs.group import free_address

    address = free_address()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *options, "--place", f"{address}/{rank}"],
            cwd=ROOT,
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [rank.communicate(timeout=bound_s)[0] for rank in started]
    finally:
        for rank in started:
            rank.kill()
            rank.wait()
    told = [
        json.loads(line.removeprefix(REPLY))
        for text in said
        for line in text.splitlines()
        if line.startswith(REPLY)
    ]
    if not told or any(rank.returncode for rank in started):
        raise RuntimeError(
            f"{module} {' '.join(options)} gave no result:\n" + "\n".join(said)[-3000:]
        )
    return told
