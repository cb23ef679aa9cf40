"""Real results of fine-tuning on real data, one experiment at a time.

Each experiment imports its models into a library of its own and trains with `python -m
train_jobs.finetune`, in plain processes, as a user without a cluster would. Figures are those that
the runs printed; the configurations are in the result.

    python -m benchmarks.quality sst2 --data ../shared/data --json benchmarks/results/....json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.env import ROOT
from benchmarks.harness import ClientLoad, arguments, end_properly, finish
from benchmarks.quality.experiments import EXPERIMENTS, TARGETS, Bench


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = arguments(__doc__ or "")
    parser.add_argument("experiment", choices=[*EXPERIMENTS])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", metavar="DIR")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train")
    parser.add_argument("--seeds", type=int, default=3, help="of sst2")
    return parser.parse_args()


def main() -> int:
    """Run one experiment and write its result."""
    args = parse()
    end_properly()
    client = ClientLoad()
    name = args.experiment
    with tempfile.TemporaryDirectory(prefix="rh-quality-") as scratch:
        bench = Bench(Path(scratch), args.data.resolve(), args.ranks, args.seeds)
        figures = EXPERIMENTS[name](bench)
    config = {"experiment": name, "ranks": args.ranks, "runs": shown(bench)}
    samples = {"roundhouse": bench.samples}
    return finish(
        f"quality {name}", args, config, samples, figures, TARGETS[name], client, "from nothing"
    )


def shown(bench: Bench) -> dict[str, object]:
    """Return the configurations without the paths of this machine."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(below) for key, below in value.items()}
        if isinstance(value, str) and value.startswith("/"):
            return str(Path(*Path(value).parts[-2:]))
        return value

    return {name: plain(config) for name, config in bench.configs.items()}


if __name__ == "__main__":
    sys.exit(main())
