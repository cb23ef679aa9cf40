"""Go on with a run that ended early: may it, from where, and how. No torch, no Ray."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import load
from cluster.errors import ConfigError, JobError
from train_jobs import attempts, checkpoint
from train_jobs.config import FinetuneConfig
from train_jobs.plan import hand_line
from train_jobs.runs import RunDir

if TYPE_CHECKING:
    from cluster.session import Cluster


def require_one(config: Path | None, resume: str | None, overrides: Sequence[str]) -> None:
    """Check that a command line says either a file or a run."""
    if (config is None) == (resume is None):
        raise ConfigError("give either CONFIG, to start a run, or --resume RUN, to go on with one")
    if resume and overrides:
        raise ConfigError(
            f"--set {overrides[0]} with --resume: a run goes on with the configuration that it "
            "began with; start a new run to change it"
        )


def require_resumable(run: RunDir) -> Path:
    """Return the newest checkpoint that looks whole.

    Raises:
        JobError: the run has succeeded, still runs, or has no checkpoint.
    """
    if attempts.is_driven(run):
        raise attempts.still_running(run)
    result = run.read_result() or {}
    if result.get("status") == "succeeded":
        raise JobError(
            f"run {run.id} has succeeded and published {result['published']}; there is nothing to "
            f"go on with: to train further, start a new run with model: {result['published']}"
        )
    path, passed = checkpoint.newest(run.checkpoints, deep=False)
    if path is None:
        raise JobError(run.without_checkpoint(passed))
    return path


def config_of(run: RunDir, local: int | None) -> FinetuneConfig:
    """Return the configuration of a run; ConfigError when ``local`` is another number of ranks."""
    config = load(run.config, FinetuneConfig)
    if local is not None and local != config.run.workers:
        raise ConfigError(
            f"--local {local}: run {run.id} has {config.run.workers} ranks, and its optimiser's "
            f"state is theirs; use --local {config.run.workers}"
        )
    return config


def job_command(run: RunDir) -> str:
    """Return the entrypoint of a job that goes on with a run."""
    return shlex.join(["python", "-m", "train_jobs.finetune", "--resume", run.id])


def submit_line(cluster: Cluster | None, run: RunDir) -> str:
    """Return the line that does by hand what ``roundhouse train --resume`` does."""
    return hand_line(cluster, job_command(run))


def describe(run: RunDir, path: Path, line: str) -> str:
    """Return the text of ``--dry-run``."""
    meta = checkpoint.read_meta(path)
    done, number = meta.progress, len(attempts.history(run)) + 1
    return (
        f"run {run.id}: attempt {number} would go on after step {done.step} ({done.tokens} tokens "
        f"in {done.seconds:.0f} s so far), with {meta.world} ranks, ZeRO {meta.zero}\n"
        f"from {path}\nby hand: {line}"
    )
