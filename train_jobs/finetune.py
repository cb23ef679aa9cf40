"""``python -m train_jobs.finetune CONFIG``: the entrypoint of a training job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import console
from cluster.config import dump
from cluster.errors import ConfigError, RoundhouseError

if TYPE_CHECKING:
    from train_jobs.config import FinetuneConfig
    from train_jobs.runs import RunDir


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m train_jobs.finetune", description=__doc__)
    parser.add_argument(
        "config", type=Path, nargs="?", help="a file of configs/train/, or a run's config.json"
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that has ended early")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen")
    parser.add_argument(
        "--local", type=int, metavar="N", help="N processes of this machine, without Ray"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, then run; 0 or 1, and ``result.json`` in the run's folder."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except RoundhouseError as error:
        console.error(str(error))
        return 1


def _run(args: argparse.Namespace) -> int:
    # everything that can be wrong in the file is found before anything heavy is imported
    from train_jobs import resume
    from train_jobs.plan import resolve
    from train_jobs.runs import RunDir
    from train_jobs.task import Task

    resume.require_one(args.config, args.resume, args.overrides)
    if args.resume:
        run = RunDir.find(args.resume)
        checkpoint = resume.require_resumable(run)
        config = resume.config_of(run, args.local, args.overrides)
        resume.require_same_data(checkpoint, config)
        if args.dry_run:
            line = resume.submit_line(None, run, args.overrides)
            console.out(resume.describe(run, config, checkpoint, line))
            return 0
        return execute(run, config, args.local is not None, resume=True)
    local = [f"run.workers={args.local}"] if args.local else []
    config = resolve(args.config, [*args.overrides, *local])
    if args.local is None and not args.dry_run:
        from train_jobs.launch import join_cluster

        join_cluster()  # so that many rows are tokenised by its tasks
    task = Task.load(config)
    if args.dry_run:
        from train_jobs.verbs import find_cluster, rehearse

        rehearse(task, find_cluster(required=False), args.config, args.overrides)
        return 0
    run = RunDir.of(args.config) or RunDir.create(args.config.stem)
    if run.config != args.config.absolute():
        run.config.write_text(dump(config))
    return execute(run, config, args.local is not None, resume=False)


def execute(run: RunDir, config: FinetuneConfig, local: bool, resume: bool) -> int:
    """Drive the run from this process until it ends; returns 0."""
    from train_jobs import attempts
    from train_jobs.resume import store

    if local and config.publish.every:
        raise ConfigError(
            f"publish.every={config.publish.every} with --local: weights go live on a cluster's "
            "shelf, and plain processes have none; leave out --local, or set publish.every=null"
        )
    offset = run.metrics_end()
    with attempts.claim(run):
        if resume:
            store(run, config)
        if local:
            from train_jobs.follow import follow
            from train_jobs.local import LocalRanks

            attempts.join(run, None, resume)
            console.out(f"run {run.id}: {run.path}")
            ranks = LocalRanks.start(run, config.run.workers, resume)
            return follow(run, ranks, offset)
        from train_jobs.launch import launch, submission_id

        attempt = attempts.join(run, submission_id(), resume)
        console.out(f"run {run.id}: {run.path}")
        return launch(run, config, attempt, resume)


if __name__ == "__main__":
    sys.exit(main())
