"""One run of `train_jobs.finetune` as a user would start it, in a home of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.env import ROOT

RUN_S = 5400.0
"""Bound of one run; the longest experiments take some twenty minutes."""


def train(home: Path, name: str, config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Train in ``ranks`` plain processes; returns the run's result, with ``wall_s``.

    Raises RuntimeError with the last words of a run that failed.
    """
    path = home / f"{name}.json"
    path.write_text(json.dumps(config))
    began = time.monotonic()
    words = [sys.executable, "-m", "train_jobs.finetune", str(path), "--local", str(ranks)]
    with (home / f"{name}.log").open("w+") as log:
        ended = subprocess.run(
            words,
            cwd=ROOT,
            env=os.environ | {"ROUNDHOUSE_HOME": str(home)},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=RUN_S,
            check=False,
        )
        log.seek(0)
        said = log.read()
    if ended.returncode:
        raise RuntimeError(f"{name} failed:\n{said[-3000:]}")
    folder = next(line for line in said.splitlines() if line.startswith("run ")).split(": ")[1]
    result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return {**result, "wall_s": round(time.monotonic() - began, 1)}


def tell(line: str) -> None:
    """Print progress where it does not mix with the result."""
    print(line, file=sys.stderr, flush=True)
