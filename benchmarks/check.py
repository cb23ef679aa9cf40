"""``make bench-check``: the committed results against the targets stated beside each program.

A target that was missed is no failure as long as the result says why; a target that a newer
program states and no result shows is one.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.env import ROOT
from benchmarks.harness import Target
from benchmarks.quality import experiments

RESULTS = ROOT / "benchmarks" / "results"
QUALITY = "quality "
PROGRAMS = (
    *("serve", "serve_http", "serve_long", "lm_eval_check", "train", "memory", "adapters"),
    *(QUALITY + name for name in experiments.EXPERIMENTS),
)


def main() -> int:
    """Print one line for each target; 1 when one is missed without a reason, or never shown."""
    newest: dict[str, tuple[str, Path, dict[str, object]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        program = result.get("program")
        if program in PROGRAMS and result["created"] >= newest.get(program, ("",))[0]:
            newest[program] = (result["created"], path, result)
    failed = 0
    for program in PROGRAMS:
        targets = targets_of(program)
        if program not in newest:
            print(f"{program}: no result in {RESULTS.relative_to(ROOT)}/")
            failed += 1
            continue
        _, path, told = newest[program]
        print(f"{program}: {path.relative_to(ROOT)}")
        for name, target in targets.items():
            line, bad = _judge(name, target, told)
            print(f"  {line}")
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
