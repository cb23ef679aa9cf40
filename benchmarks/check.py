"""``make bench-check``: the committed results against the targets stated beside each program.

A target is held to the newest result that measured it. One that was missed is no failure as long
as the result says why; a target that a newer program states and no result shows is one.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from benchmarks.env import ROOT
from benchmarks.harness import Target
from benchmarks.quality import experiments

RESULTS = ROOT / "benchmarks" / "results"
QUALITY = "quality "
PROGRAMS = (
    *("serve", "serve_http", "serve_long", "lm_eval_check", "train", "memory", "adapters"),
    *("live", "transfers"),
    *(QUALITY + name for name in experiments.EXPERIMENTS),
)


def main() -> int:
    """Print one line for each target; 1 when one is missed without a reason, or never shown."""
    results: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result.get("program"), []).append((path.name, result))
    failed = 0
    for program in PROGRAMS:
        known = sorted(results.get(program, []), key=lambda one: str(one[1]["created"]))
        if not known:
            print(f"{program}: no result in {RESULTS.relative_to(ROOT)}/")
            failed += 1
            continue
        print(f"{program}: {known[-1][0]}")
        for name, target in targets_of(program).items():
            # the newest that measured it: a program's parts may be measured one by one
            told = next((one for one in reversed(known) if name in one[1]["ratios"]), known[-1])
            line, bad = _judge(name, target, told[1])
            print(f"  {line}{'' if told is known[-1] else f' ({told[0]})'}")
            failed += bad
    return 1 if failed else 0


def targets_of(program: str) -> dict[str, Target]:
    """Return what a program's figures should be."""
    if program.startswith(QUALITY):
        return experiments.TARGETS[program.removeprefix(QUALITY)]
    targets: dict[str, Target] = importlib.import_module(f"benchmarks.{program}").TARGETS
    return targets


def _judge(name: str, target: Target, result: dict[str, object]) -> tuple[str, bool]:
    ratios, missed = result["ratios"], result.get("missed") or {}
    assert isinstance(ratios, dict)
    assert isinstance(missed, dict)
    if name not in ratios:
        return f"{name}: not measured", True
    value = ratios[name]
    if target.met(value):
        return f"{name}: {value:g} ({target})", False
    why = (missed.get(name) or {}).get("why")
    return f"{name}: {value:g}, missed ({target}): {why or 'no reason given'}", not why


if __name__ == "__main__":
    sys.exit(main())
