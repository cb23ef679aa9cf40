"""Training throughput and memory of our step loop beside the Hugging Face Trainer, in one run.

Two ranks, the same model, dialogues, global batch, optimiser and clipping. The Trainer pads the
dialogues of a micro-batch to the longest of them and computes logits everywhere, as it does by
itself; our loop packs them and computes logits where something is trained. What counts are useful
tokens: those of the dialogues, without padding.

Sides: our loop in the number format that this processor is fast at; the Trainer with DeepSpeed
ZeRO-2 as it runs on a CPU, which is float32 (its bf16 switch silently drops DeepSpeed); and the
Trainer's own bf16 DDP. One of the two computes in our format: it is the peer of equal precision.

Cases: ``alpaca``, real lengths (the demo's dialogues where that file is not there); ``equal``,
rows of one length with every token trained, and ``masked``, half of them; ``vocabulary``, peak
memory with 150,000 entries.

    python -m benchmarks.train --json benchmarks/results/train-....json
    python -m benchmarks.train --cases alpaca --data FILE.json --rounds 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    START_S,
    ClientLoad,
    Target,
    arguments,
    default_model,
    finish,
    median_ratio,
    model_label,
    names_of,
    reply,
)
from benchmarks.training.cases import CASES, RANKS, prepare
from benchmarks.training.ranks import run_ranks
from benchmarks.training.sides import DDP_BF16, DEEPSPEED, OURS, RUNS, SIDES

WARM, MEASURED = 2, 3
MEASURED_OF_ALPACA = 8
"""How much the Trainer pads is luck, and evens out over some steps."""
STEP_S = 600.0
TARGETS = {
    "vs_hf_deepspeed_alpaca": Target(at_least=2.5),
    "vs_hf_ddp_bf16_alpaca": Target(at_least=1.5),
    "vs_hf_equal_length": Target(at_least=1.0),
    "vs_hf_equal_length_masked": Target(at_least=1.15),
    "peak_memory_vs_hf_150k": Target(at_most=0.7),
    "step_overhead_share": Target(at_most=0.05),
}
Samples = dict[str, dict[str, list[float]]]


def be_rank(args: argparse.Namespace) -> int:
    """Be one rank of one side: ``HOST:PORT/RANK`` in ``--place``."""
    address, _, rank = args.place.rpartition("/")
    home = Path(os.environ["ROUNDHOUSE_HOME"])
    told = RUNS[args.side](home, address, int(rank), *map(int, args.steps.split(",")))
    if int(rank) == 0:
        reply(told)
    return 0


def measure(side: str, home: Path, threads: int, case: str) -> dict[str, Any]:
    """Run all ranks of one side once; RuntimeError with its last words when one fails."""
    warm, measured = steps_of(side, case)
    env = {"ROUNDHOUSE_HOME": str(home), "OMP_NUM_THREADS": str(threads // RANKS or 1)}
    options = ["--side", side, "--steps", f"{warm},{measured}"]
    bound_s = START_S + STEP_S * (warm + measured)
    return run_ranks("benchmarks.train", options, RANKS, env, bound_s)[0]


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--cases", type=names_of([*CASES]), default=[*CASES], metavar="A,B")
    parser.add_argument("--sides", type=names_of([*SIDES]), default=[*SIDES], metavar="A,B")
    parser.add_argument("--data", type=Path, metavar="FILE", help="other dialogues for alpaca")
    parser.add_argument("--place", help=argparse.SUPPRESS)
    parser.add_argument("--steps", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure the sides of each case in alternating rounds."""
    args = parse()
    if args.side:
        return be_rank(args)
    model = args.model or default_model()
    client = ClientLoad()
    samples: Samples = {}
    engines: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    equal = equal_precision()
    for case in args.cases:
        wanted = [*SIDES] if case == "alpaca" else [OURS, equal]
        sides = [side for side in wanted if side in args.sides]
        with tempfile.TemporaryDirectory(prefix="rh-bench-") as scratch:
            shapes[case] = prepare(case, Path(scratch), model, args.data, sum(steps_of(OURS, case)))
            for number in range(args.rounds):
                for side in sides if number % 2 == 0 else reversed(sides):
                    told = measure(side, Path(scratch), args.threads, case)
                    keep(case, told, samples.setdefault(side, {}))
                    engines[side] = told["engine"]
                    said = f"{speed(told):.1f} useful tokens/s, peak {told['peak'] / 2**30:.2f} GiB"
                    print(f"{case} round {number + 1} {side}: {said}", file=sys.stderr, flush=True)
    config = {
        "model": model_label(model),
        "ranks": RANKS,
        "cases": shapes,
        "warm_up_and_measured_steps": {
            case: {side: steps_of(side, case) for side in args.sides} for case in args.cases
        },
        "rounds": args.rounds,
        "engines": engines,
        "equal_precision": equal,
    }
    found = ratios(samples, equal)
    return finish("train", args, config, samples, found, TARGETS, client, "warm after two steps")


def equal_precision() -> str:
    """Return the side that computes in the format that ours picks on this processor."""
    from cluster.device import resolve_dtype

    return DEEPSPEED if resolve_dtype("auto", "cpu") == "float32" else DDP_BF16


def steps_of(side: str, case: str) -> tuple[int, int]:
    """Return warm-up and measured steps of a side.

    Numbers that the processor has to emulate take minutes a step: one of those says enough.
    """
    if side == DDP_BF16 != equal_precision():
        return 0, 1
    return WARM, MEASURED_OF_ALPACA if case == "alpaca" else MEASURED


def speed(told: Mapping[str, Any]) -> float:
    """Return useful tokens a second of the measured steps."""
    return float(sum(told["tokens"]) / sum(told["step_s"]))


def keep(case: str, told: Mapping[str, Any], mine: dict[str, list[float]]) -> None:
    """Add one run to a side's samples."""
    mine.setdefault(f"useful_tokens_per_s_{case}", []).append(speed(told))
    mine.setdefault(f"step_s_{case}", []).extend(told["step_s"])
    mine.setdefault(f"tokens_per_step_{case}", []).extend(told["tokens"])
    mine.setdefault(f"peak_bytes_{case}", []).append(told["peak"])
    for name in ("overhead", "communication"):
        if name in told:
            mine.setdefault(f"{name}_share_{case}", []).append(told[name] / sum(told["step_s"]))


def ratios(samples: Samples, equal: str) -> dict[str, float]:
    """Return what can be compared in what was measured."""
    found: dict[str, float] = {}
    pairs = {
        "vs_hf_deepspeed_alpaca": ("useful_tokens_per_s_alpaca", DEEPSPEED),
        "vs_hf_ddp_bf16_alpaca": ("useful_tokens_per_s_alpaca", DDP_BF16),
        "vs_hf_equal_precision_alpaca": ("useful_tokens_per_s_alpaca", equal),
        "vs_hf_equal_length": ("useful_tokens_per_s_equal", equal),
        "vs_hf_equal_length_masked": ("useful_tokens_per_s_masked", equal),
        "peak_memory_vs_hf_150k": ("peak_bytes_vocabulary", equal),
    }
    for name, (figure, peer) in pairs.items():
        if all(figure in samples.get(side, {}) for side in (OURS, peer)):
            found[name] = median_ratio(samples, figure, OURS, peer)
    shares = [
        statistics.median(values)
        for figure, values in samples.get(OURS, {}).items()
        if figure.startswith("overhead_share_")
    ]
    if shares:
        found["step_overhead_share"] = round(max(shares), 4)
    return found


if __name__ == "__main__":
    sys.exit(main())
