"""A long run through HTTP: a quarter of a million tokens, and what memory does meanwhile.

The whole of Roundhouse under a steady load of 32 streams. After each turn the resident memory of
all its processes is noted; a line through the samples after the first fifth says whether it grows.

    python -m benchmarks.serve_long --json benchmarks/results/serve-long-....json
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence

from benchmarks.harness import (
    ClientLoad,
    Target,
    arguments,
    default_model,
    end_properly,
    finish,
    model_label,
)
from benchmarks.load import stream
from benchmarks.servers import Running, Setup, ours
from benchmarks.workloads import questions, turn

OURS = "roundhouse"
TOKENS = 250_000
NEW_TOKENS = 64
CONCURRENCY = 32
TURNS = 4
"""Requests of one turn, for each connection."""
TURN_S = 900.0
WARM_SHARE = 0.2
"""Of the run, what comes before memory is expected to be flat."""
TARGETS = {"rss_growth_share": Target(at_most=0.05)}


def main() -> int:
    """Serve, load, watch."""
    args = parse()
    end_properly()
    model = (args.model or default_model()).resolve()
    source, asked = questions()
    client = ClientLoad()
    with ours(Setup(model, args.threads, args.dtype)) as running:
        samples = asyncio.run(long_run(running, asked, args))
    growth = slope(samples["tokens_so_far"], samples["rss_mib"], WARM_SHARE)
    config = {
        "model": model_label(model),
        "questions": source,
        "tokens": args.tokens,
        "new_tokens": NEW_TOKENS,
        "concurrency": CONCURRENCY,
        "dtype": args.dtype,
    }
    ratios = {"rss_growth_share": growth}
    return finish(
        "serve_long", args, config, {OURS: samples}, ratios, TARGETS, client, "from the first token"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to generate in all")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    return parser.parse_args(argv)


async def long_run(
    running: Running, asked: Sequence[str], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Generate ``--tokens`` tokens without a pause; note memory and speed after each turn."""
    samples: dict[str, list[float]] = {"rss_mib": [], "tokens_so_far": [], "tokens_per_s": []}
    done, number = 0, 0
    while done < args.tokens:
        batch = turn(asked, number, TURNS * CONCURRENCY)
        told = await stream(running.endpoint, batch, NEW_TOKENS, CONCURRENCY, TURN_S)
        done, number = done + told.tokens, number + 1
        rss, speed = running.rss_mib(), told.tokens / told.seconds
        samples["tokens_so_far"].append(float(done))
        samples["rss_mib"].append(rss)
        samples["tokens_per_s"].append(speed)
        print(f"{done} tokens, {rss:.0f} MiB, {speed:.0f} tokens/s", file=sys.stderr, flush=True)
    return samples


def slope(tokens: Sequence[float], rss: Sequence[float], warm_share: float) -> float:
    """Return the growth of memory over the rest of a run, as a share of what was held then.

    A straight line through all samples after the first ``warm_share`` of the tokens: one noisy
    sample at either end does not decide.
    """
    begin = warm_share * tokens[-1]
    kept = [(t, r) for t, r in zip(tokens, rss, strict=True) if t >= begin]
    if len(kept) < 2:
        raise ValueError(f"{len(tokens)} samples are too few to see growth: ask for more tokens")
    line = statistics.linear_regression([t for t, _ in kept], [r for _, r in kept])
    return line.slope * (kept[-1][0] - kept[0][0]) / statistics.fmean(r for _, r in kept)


if __name__ == "__main__":
    sys.exit(main())
