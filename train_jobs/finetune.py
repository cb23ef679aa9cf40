"""``python -m train_jobs.finetune CONFIG``: the entrypoint of a training job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import console
from cluster.config import dump
from cluster.errors import RoundhouseError


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m train_jobs.finetune", description=__doc__)
    parser.add_argument(
        "config", type=Path, help="a file of configs/train/, or a run's config.json"
    )
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
    from train_jobs.plan import resolve
    from train_jobs.task import Task

    local = [f"run.workers={args.local}"] if args.local else []
    config = resolve(args.config, [*args.overrides, *local])
    task = Task.load(config)
    if args.dry_run:
        from train_jobs.cli import find_cluster, rehearse

        rehearse(task, find_cluster(required=False), args.config, args.overrides)
        return 0
    from train_jobs.runs import RunDir

    run = RunDir.of(args.config) or RunDir.create(args.config.stem)
    run.claim()
    if run.config != args.config.absolute():
        run.config.write_text(dump(config))
    console.out(f"run {run.id}: {run.path}")
    if args.local:
        from train_jobs.follow import follow
        from train_jobs.local import LocalRanks

        return follow(run, LocalRanks.start(run, config.run.workers))
    from train_jobs.launch import launch

    return launch(run, config)


if __name__ == "__main__":
    sys.exit(main())
