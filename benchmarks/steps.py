"""Where the time of one engine step goes, part by part, beside what the machine could do.

Rank 0's own parts in this process, one after the other, each timed: composing the step, laying it
out, computing it (by the kernels' own clock: projections, attention, feed-forward, head), picking
tokens, booking them, packing the message. Ceilings are measured in the same run: reading weights
as fast as this machine reads memory, and torch's float32 matrix product.

    python -m benchmarks.steps --json benchmarks/results/steps-....json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import ClientLoad, arguments, default_model, finish, model_label

DECODING = (1, 8, 32, 64)
CONTEXT = 128
PREFILL = 512
STEPS = 24
ROUNDHOUSE, MACHINE = "roundhouse", "machine"


@dataclass
class Clock:
    """Milliseconds of each part of each step."""

    parts: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as one sample of ``name``."""
        began = time.perf_counter()
        yield
        self.parts.setdefault(name, []).append((time.perf_counter() - began) * 1e3)


class Rank:
    """Rank 0's parts without its process."""

    def __init__(self, directory: Path, dtype: str, quantization: Any, blocks: int) -> None:
        import torch

        from serve_apps.engine.kv_cache import KVCache
        from serve_apps.engine.model import load_model
        from serve_apps.engine.sampler import Picker
        from serve_apps.engine.scheduler import Scheduler

        self.model = load_model(
            str(directory), torch.device("cpu"), getattr(torch, dtype), quantization
        )
        self.cache = KVCache(self.model.geometry, blocks, self.model.device)
        self.scheduler = Scheduler(blocks, PREFILL, max(DECODING), prefix_cache=False)
        self.picker = Picker(self.model.vocab_size, self.model.device)

    def add(self, name: str, tokens: int, answer: int) -> None:
        """Queue one request."""
        from serve_apps.engine.interface import Sampling
        from serve_apps.engine.scheduler import Running

        ids = [(i * 37 + hash(name)) % 40_000 + 5 for i in range(tokens)]
        greedy = Sampling(temperature=0.0)
        self.picker.add(name, ids, greedy, 0)
        self.scheduler.add(Running(name, "", ids, answer, greedy, 0))

    def step(self, clock: Clock) -> Any:
        """Compute one step; returns it, or None when there is none."""
        from serve_apps.engine import attention
        from serve_apps.engine.wire import pack

        with clock.part("compose"):
            step = self.scheduler.next_step(time.monotonic())
        if step is None:
            return None
        with clock.part("lay_out"):
            plan = step.plan()
            attending = attention.plan(plan, self.cache)
        with clock.part("compute"):
            logits = self.model.forward(plan, attending)
        with clock.part("pick"):
            picked = self.picker.pick(logits, step.picks) if step.picks else []
        with clock.part("book"):
            told = self.scheduler.complete(step, picked)
        with clock.part("message"):
            pack({"t": "step", "n": step.number, "out": [one.pack() for one in told]})
        return step


def measured(rank: Rank, requests: int, context: int, steps: int) -> dict[str, list[float]]:
    """Return milliseconds a step of each part, for ``requests`` that decode (0: that prefill)."""
    import torch

    from serve_apps.engine.native.layout import PARTS

    native = rank.model.native
    for i in range(max(requests, 1)):
        rank.add(f"r{requests}-{i}", context, steps + 1 if requests else 1)
    warm = Clock()
    while requests and any(not r.decodes for r in rank.scheduler.running + rank.scheduler.waiting):
        rank.step(warm)
    clock, inside = Clock(), dict[str, list[float]]()
    while True:
        if native is not None:
            native.seconds = torch.zeros(len(PARTS), dtype=torch.float64)
        if rank.step(clock) is None:
            break
        if native is not None:
            for name, seconds in zip(PARTS, native.seconds.tolist(), strict=True):
                inside.setdefault(f"kernel_{name}", []).append(seconds * 1e3)
    parts = clock.parts
    parts["compose"] = parts["compose"][: len(parts["compute"])]
    parts["step"] = [sum(each) for each in zip(*parts.values(), strict=True)]
    return {**parts, **inside}


def ceilings(threads: int) -> dict[str, list[float]]:
    """Return what this machine reads (GB/s) and multiplies (GFLOP/s, float32) at best."""
    import torch

    torch.set_num_threads(threads)
    big, a = torch.ones(96 * 2**20), torch.randn(1536, 1536)

    def best(work: Callable[[], Any]) -> float:
        work()
        seconds = []
        for _ in range(7):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    return {
        "read_gb_per_s": [big.nbytes / best(big.sum) / 1e9],
        "product_gflop_per_s": [2 * 1536**3 / best(lambda: a @ a) / 1e9],
    }


def main() -> int:
    """Measure decoding at several sizes and one prefill."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quantization", default="none", choices=("none", "int8"))
    args: argparse.Namespace = parser.parse_args()
    args.model = args.model or default_model()
    client = ClientLoad()
    machine = ceilings(args.threads)
    blocks = max(DECODING) * (CONTEXT + STEPS + 32) // 16
    rank = Rank(args.model, args.dtype, args.quantization, blocks)
    mine = dict[str, list[float]]()
    for count in DECODING:
        for name, values in measured(rank, count, CONTEXT, STEPS).items():
            mine[f"decode{count}_{name}_ms"] = values
    for _ in range(args.rounds):
        for name, values in measured(rank, 0, PREFILL, 1).items():
            mine.setdefault(f"prefill{PREFILL}_{name}_ms", []).extend(values)
    ratios = dict[str, float]()
    weights, flops = rank.model.weight_bytes, 2 * rank.model.linear_weights
    for count in DECODING:
        step = statistics.median(mine[f"decode{count}_step_ms"]) / 1e3
        compute = statistics.median(mine[f"decode{count}_compute_ms"]) / 1e3
        ratios[f"computing_share_c{count}"] = compute / step
        ratios[f"read_share_c{count}"] = weights / step / machine["read_gb_per_s"][0] / 1e9
        peak = machine["product_gflop_per_s"][0] * 1e9
        ratios[f"product_share_c{count}"] = count * flops / step / peak
    step = statistics.median(mine[f"prefill{PREFILL}_step_ms"]) / 1e3
    ratios["product_share_prefill"] = PREFILL * flops / step / peak
    config = {
        "model": model_label(args.model),
        "dtype": args.dtype,
        "quantization": args.quantization,
        "context": CONTEXT,
        "steps": STEPS,
        "weight_bytes": weights,
        "native_kernels": rank.model.native is not None,
    }
    samples = {ROUNDHOUSE: mine, MACHINE: machine}
    return finish("steps", args, config, samples, ratios, {}, client, "warm")


if __name__ == "__main__":
    sys.exit(main())
