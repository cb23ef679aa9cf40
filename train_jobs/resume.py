"""Go on with a run that ended early: may it, from where, and how. No torch, no Ray."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import dump, load
from cluster.console import counted
from cluster.errors import ConfigError, JobError
from train_jobs import attempts, checkpoint
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import hashes_of
from train_jobs.plan import hand_line
from train_jobs.runs import RunDir

if TYPE_CHECKING:
    from cluster.session import Cluster


def require_one(config: Path | None, resume: str | None, overrides: Sequence[str]) -> None:
    """Check that a command line says either a file or a run."""
    if (config is None) == (resume is None):
        raise ConfigError("give either CONFIG, to start a run, or --resume RUN, to go on with one")
    fixed = [one for one in overrides if not checkpoint.is_free(one.partition("=")[0])]
    if resume and fixed:
        raise ConfigError(
            f"--set {fixed[0]} with --resume: a run goes on with the configuration that it began "
            f"with; only {', '.join(checkpoint.FREE)} may change. Start a new run to change more"
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


def config_of(run: RunDir, local: int | None, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Return the configuration of a run with what is asked to be other from here on.

    Raises:
        ConfigError: what is asked for cannot be, as a number of ranks that does not divide
            ``batch.total``.
    """
    asked = [*overrides, *([f"run.workers={local}"] if local else [])]
    if any(one.startswith("run.workers=") for one in asked):
        asked = ["run.min_workers=null", *asked]
    return load(run.config, FinetuneConfig, asked)


def store(run: RunDir, config: FinetuneConfig) -> None:
    """Write what has changed into the run's folder, where its ranks read it.

    How many ranks there are is a matter of one attempt, and stays as the run began.
    """
    begun = load(run.config, FinetuneConfig)
    ranks = {"workers": begun.run.workers, "min_workers": begun.run.min_workers}
    kept = config.model_copy(update={"run": config.run.model_copy(update=ranks)})
    if kept != begun:
        staged = run.config.with_suffix(".partial")
        staged.write_text(dump(kept))
        os.replace(staged, run.config)


def require_same_data(path: Path, config: FinetuneConfig) -> None:
    """Refuse to go on from a checkpoint with other data; its ranks look once more themselves.

    Raises:
        JobError: the content of a file was changed since.
        ConfigError: a file is gone.
    """
    meta = checkpoint.read_meta(path)
    if meta.data is not None:
        checkpoint.check_data(path, meta, hashes_of(config.data))


def job_command(run: RunDir, overrides: Sequence[str] = ()) -> str:
    """Return the entrypoint of a job that goes on with a run."""
    words = ["python", "-m", "train_jobs.finetune", "--resume", run.id]
    return shlex.join(words + [word for value in overrides for word in ("--set", value)])


def submit_line(cluster: Cluster | None, run: RunDir, overrides: Sequence[str] = ()) -> str:
    """Return the line that does by hand what ``roundhouse train --resume`` does."""
    return hand_line(cluster, job_command(run, overrides))


def describe(run: RunDir, config: FinetuneConfig, path: Path, line: str) -> str:
    """Return the text of ``--dry-run``."""
    meta, ranks = checkpoint.read_meta(path), config.run
    done, number = meta.progress, len(attempts.history(run)) + 1
    some = counted(ranks.workers, "rank")
    if ranks.min_workers:
        some = f"{ranks.least_workers} to {some}"
    same = meta.world == ranks.workers == ranks.least_workers
    wrote = "" if same else f" ({meta.world} wrote the checkpoint)"
    return (
        f"run {run.id}: attempt {number} would go on after step {done.step} ({done.tokens} tokens "
        f"in {done.seconds:.0f} s so far), with {some}{wrote}, ZeRO {meta.zero}\n"
        f"from {path}\nby hand: {line}"
    )
