"""How long a run will take, from ten steps of it."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping
from typing import Any

from cluster.config import build
from cluster.errors import ConfigError, JobError
from train_jobs.config import FinetuneConfig
from train_jobs.follow import duration
from train_jobs.runs import RunDir

WARM, TIMED = 2, 10
"""The first steps allocate what the others use again."""


def short(config: FinetuneConfig) -> FinetuneConfig:
    """Return the same run with its first steps only, which measures and publishes nothing.

    Raises:
        ConfigError: its steps themselves publish.
    """
    app = getattr(config.objective, "app", None)
    if app:
        raise ConfigError(
            f"--time with objective.app={app}: before the first step the run gives the app its "
            f"weights, which publishes a version and moves {app}@champion; add `--set "
            "objective.app=null` to time it with answers of its own processes"
        )
    return build(
        config.model_dump(mode="json"),
        FinetuneConfig,
        [
            *("run.epochs=null", f"run.steps={WARM + TIMED}", "run.save_every=null"),
            *("data.heldout=null", "data.split=0", "run.evaluate_every=null", "run.best=null"),
            *("run.early_stop=null", "publish.which=last", "publish.hold=true", "track=[]"),
            "publish.every=null",
        ],
    )


def told(run: RunDir, steps: int) -> dict[str, Any]:
    """Return what the steps of a short run say about ``steps`` of them; the run's folder goes.

    Raises:
        JobError: it did not come far enough.
    """
    records = [record for record, _ in run.read_metrics()]
    seconds = [one["step_s"] for one in records if "event" not in one][WARM:]
    ready = next((one["seconds"] for one in records if one.get("event") == "ready"), 0.0)
    if not seconds:
        raise JobError(f"run {run.id} has no step behind the first {WARM}; give it more rows")
    shutil.rmtree(run.path, ignore_errors=True)
    middle = statistics.median(seconds)
    spread = sorted(seconds)
    return {
        "timed_steps": len(seconds),
        "step_s": middle,
        "step_s_range": [spread[0], spread[-1]],
        "start_s": ready,
        "steps": steps,
        "run_s": ready + statistics.fmean(seconds) * steps,
    }


def sentence(found: Mapping[str, Any]) -> str:
    """Return it for people."""
    low, high = found["step_s_range"]
    return (
        f"{found['timed_steps']} steps took {found['step_s']:.2f} s each ({low:.2f} to "
        f"{high:.2f}); all {found['steps']} will take {duration(found['run_s'])}, "
        f"{found['start_s']:.0f} s of it to start, and what the held-out rows take beside"
    )
