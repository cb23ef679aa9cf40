"""Where the time of one training step goes, kind by kind, beside what the machine could do.

Two ranks run the loop on the dialogues of ``benchmarks.train``; the last step is profiled on rank
0. The ceiling is measured in the same run: torch's matrix product in the model's shapes, on all
ranks at once. ``products_bound_tokens_per_s`` is what a loop would reach that did nothing but the
model's products, at 6 FLOPs for each trained parameter and token (arXiv:2001.08361).

    python -m benchmarks.train_steps --json benchmarks/results/train-steps-....json
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.harness import ClientLoad, Target, arguments, default_model, finish, model_label
from benchmarks.train import measure, speed, steps_of
from benchmarks.training.cases import CASES, RANKS, prepare
from benchmarks.training.sides import PROFILED

TARGETS: dict[str, Target] = {}


def main() -> int:
    """Profile a step in each round."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--case", choices=CASES, default="alpaca")
    parser.add_argument("--data", type=Path, metavar="FILE", help="other dialogues for alpaca")
    args = parser.parse_args()
    model, client = args.model or default_model(), ClientLoad()
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="rh-bench-") as scratch:
        shape = prepare(
            args.case, Path(scratch), model, args.data, sum(steps_of(PROFILED, args.case))
        )
        for _ in range(args.rounds):
            told = measure(PROFILED, Path(scratch), args.threads, args.case)
            flop = 6e-9 * told["engine"]["parameters"]
            found = {
                **{f"{kind}_s": seconds for kind, seconds in told["seconds"].items()},
                "step_s": told["step_s"][-1],
                "useful_tokens_per_s": speed(told),
                "products_gflop_per_s": told["gflop_per_s"],
                "products_bound_tokens_per_s": told["gflop_per_s"] / flop,
            }
            for name, value in found.items():
                samples.setdefault(name, []).append(value)
    step = sum(samples["step_s"])
    ratios = {f"{kind}_share": sum(samples[f"{kind}_s"]) / step for kind in told["seconds"]}
    bound = sum(samples["products_bound_tokens_per_s"])
    ratios["of_products_bound"] = sum(samples["useful_tokens_per_s"]) / bound
    config = {
        "model": model_label(model),
        "ranks": RANKS,
        "case": shape,
        "engine": told["engine"],
        "longest_operators_s": told["operators"],
    }
    return finish(
        "train_steps", args, config, {"roundhouse": samples}, ratios, TARGETS, client, "warm"
    )


if __name__ == "__main__":
    sys.exit(main())
