"""Weights that change under load, on this machine: no request lost, none mixed, how long it takes.

``updates``: two replicas of SmolLM2 answer 16 streams while three versions arrive by the shelf and
the last is taken back; each answer is scored under the version that it names. ``leaks``: fifty
further updates, and what memory, object store and cache blocks have grown by. ``trainer``: from a
run's last optimiser step to the first token of its weights, for all of them and for an adapter;
beside it the same by files and a restart of our replica, and by a restart of vLLM's CPU build.
``memory``: what 1, 2 and 4 replicas take that map one copy of their weights, and how soon another
one is ready, from the shelf and from files. ``nodes``: a version that was never on a node's disk,
from another node.

    python -m benchmarks.live --json benchmarks/results/live-....json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from benchmarks.harness import (
    ClientLoad,
    Target,
    arguments,
    default_model,
    distribution,
    end_properly,
    finish,
    model_label,
    names_of,
)
from benchmarks.live import TARGETS
from benchmarks.live.memory import measure_memory
from benchmarks.live.nodes import measure_nodes
from benchmarks.live.rig import Rig
from benchmarks.live.trainer import measure_trainer
from benchmarks.live.updates import measure_leaks, measure_updates

PARTS = ("updates", "leaks", "trainer", "memory", "nodes")
__all__ = ["TARGETS", "Target", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each part on a cluster of its own."""
    args = parse(argv)
    end_properly()
    client = ClientLoad()
    samples: dict[str, dict[str, list[float]]] = {}
    if "nodes" in args.parts:
        samples["nodes"] = measure_nodes(args)
    with Rig(args.model) if set(args.parts) - {"nodes"} else nullcontext() as rig:
        if "updates" in args.parts or "leaks" in args.parts:
            step = {"max_batch_tokens": args.step_tokens}
            with rig.deployed(replicas=2, streams=args.streams, **step) as endpoint:
                if "updates" in args.parts:
                    samples["updates"] = measure_updates(rig, endpoint, args)
                if "leaks" in args.parts:
                    samples["leaks"] = measure_leaks(rig, endpoint, args)
        if "trainer" in args.parts:
            samples |= measure_trainer(rig, args)
        if "memory" in args.parts:
            samples |= measure_memory(rig, args)
    config = {
        "model": model_label(args.model),
        "streams": args.streams,
        "step_tokens": args.step_tokens,
        "updates": args.updates,
        "new_tokens": args.new_tokens,
        "dtype": "float32",
        "sampling": "greedy",
    }
    figures = ratios(samples)
    return finish("live", args, config, samples, figures, TARGETS, client, "warm")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--parts", type=names_of(PARTS), default=list(PARTS), metavar="A,B")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--updates", type=int, default=50, help="of the leak check")
    parser.add_argument("--steady-s", type=float, default=40.0, help="of load before an update")
    parser.add_argument(
        "--step-tokens", type=int, default=32, help="at most in a step: who waits for a prompt"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args(argv)
    args.model = (args.model or default_model()).resolve()
    return args


def ratios(samples: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Return the figures by the names that the targets have."""
    found: dict[str, float] = {}
    if told := samples.get("updates"):
        for name in ("failed_requests", "truncated_requests", "mixed_requests", "unexplained"):
            found[name] = told[name][0]
        steady = distribution(told["steady_gap_ms"])["p99"]
        found["gap_ms_above_p99"] = max(told["update_gap_ms"]) - steady
    if told := samples.get("leaks"):
        for name in ("rss_growth_mib", "store_growth_mib", "leaked_cache_tokens"):
            found[name] = told[name][0]
    for name in ("full", "lora"):
        if told := samples.get(f"trainer-{name}"):
            found[f"trainer_to_live_s_{name}"] = statistics.median(told["to_first_token_s"])
    if told := samples.get("restarts"):
        for name in ("restart_s_file", "restart_s_vllm"):
            if name in told:
                found[name] = statistics.median(told[name])
    if told := samples.get("memory-shelf"):
        disk = samples["memory-files"]
        found["pss_weights_4_replicas_vs_1"] = (
            told["pss_store_mib_4"][0] / told["pss_store_mib_1"][0]
        )
        found["pss_ranks_4_shared_vs_packed"] = (
            told["pss_ranks_mib_4"][0] / disk["pss_ranks_mib_4"][0]
        )
        found["cold_start_vs_disk"] = statistics.median(told["ready_s"]) / statistics.median(
            disk["ready_s"]
        )
    if told := samples.get("nodes"):
        found["cold_load_other_node_vs_files"] = statistics.median(
            told["load_other_node_s"]
        ) / statistics.median(told["load_files_s"])
    return found


if __name__ == "__main__":
    sys.exit(main())
