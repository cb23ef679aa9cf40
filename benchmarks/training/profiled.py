"""Where one step of our loop goes, by kind of work, beside what this machine's products give."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from benchmarks.training.cases import MAX_LEN, ROWS
from benchmarks.training.probe import Probe

KINDS: Mapping[str, tuple[str, ...]] = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "exchange": ("c10d::", "gloo:", "record_param_comms", "torch::autograd::AccumulateGrad"),
    "optimiser": ("aten::_fused_adamw", "aten::_foreach"),
}
"""By the beginnings of torch's operator names; what has none of them is ``other``. DeepSpeed
reduces gradients in hooks of what accumulates them."""
SHAPES = ((576, 576), (1536, 576), (576, 1536))
"""Outputs and inputs of SmolLM2's linear layers."""
LONGEST = 20
"""Operators that are told one by one."""
SHAPE_S = 0.5
"""How long the products of one shape are timed."""


class Profiler(Probe):
    """Has torch's profiler look at the last of some steps.

    ``waiting`` is what no operator of this rank accounts for.
    """

    def __init__(self, steps: int) -> None:
        """Wait for the last of ``steps``."""
        from torch.profiler import ProfilerActivity, profile

        self._last = steps
        self._profile = profile(activities=[ProfilerActivity.CPU])

    def after(self, step: int) -> None:
        """Start before the last step, and stop after it."""
        if step == self._last - 1:
            self._profile.start()
        elif step == self._last:
            self._profile.stop()

    def found(self, last_step_s: float) -> dict[str, Any]:
        """Return the seconds of each kind, and what products give with all ranks busy."""
        seconds = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in self._profile.key_averages():
            seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        seconds["waiting"] = last_step_s - sum(seconds.values())
        longest = sorted(self._profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
        operators = {e.key: round(e.self_cpu_time_total / 1e6, 3) for e in longest[:LONGEST]}
        gflop_per_s = products_gflop_per_s()
        return {"seconds": seconds, "operators": operators, "gflop_per_s": gflop_per_s}


def kind_of(operator: str) -> str:
    """Return what an operator's time counts as."""
    return next((kind for kind, names in KINDS.items() if operator.startswith(names)), "other")


def products_gflop_per_s() -> float:
    """Return what float32 products of the model's shapes give, over all ranks together."""
    import torch

    from train_jobs.ports import sum_over_ranks

    rows, done = MAX_LEN * ROWS["alpaca"] // 2, 0.0
    sum_over_ranks([0.0])  # all begin at once
    began = time.perf_counter()
    for wide, deep in SHAPES:
        x, w = torch.randn(rows, deep), torch.randn(wide, deep)
        until = time.perf_counter() + SHAPE_S
        while time.perf_counter() < until:
            torch.nn.functional.linear(x, w)
            done += 2e-9 * rows * wide * deep
    return sum_over_ranks([done / (time.perf_counter() - began)])[0]
