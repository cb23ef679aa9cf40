"""The memory that ``roundhouse train --dry-run`` tells for a rank, beside what a rank takes.

Each case is one run of a few steps as plain processes: full and LoRA, ZeRO 0, 2 and 3, one and
two ranks, two sizes of a micro-batch. Measured is the peak of resident memory above what the
process has once everything is imported and its data read, until the last step is done; the
largest of the ranks counts. The ratios are estimate over measurement.

    python -m benchmarks.memory --models smollm2=DIR,minilm=DIR --json FILE
    python -m benchmarks.memory --models minilm=DIR --cases full-z2-r2-m1

``--measured FILE`` takes the peaks from an earlier result and only estimates anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    START_S,
    ClientLoad,
    Target,
    arguments,
    default_model,
    finish,
    names_of,
    reply,
)
from benchmarks.training.cases import ALPACA, DEMO, dialogues
from benchmarks.training.ranks import run_ranks

STEPS = 8
"""The optimiser's state is there from the second step on."""
NEAR = 0.15
TARGETS = {
    "estimate_error_smollm2": Target(at_most=NEAR),
    "estimate_error_minilm": Target(at_most=NEAR),
}
TEXTS = 200
MAX_LEN = {"smollm2": 512, "minilm": 128}
MICRO = {"smollm2": (1, 2), "minilm": (8, 32)}
"""Packed rows of 512 tokens; texts of 128."""
LORA = {"kind": "lora", "r": 16}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    adapter: bool
    zero: int
    ranks: int
    size: int
    """Which of the model's two micro-batches: 1 or 2."""

    def __str__(self) -> str:
        kind = "lora" if self.adapter else "full"
        return f"{kind}-z{self.zero}-r{self.ranks}-m{self.size}"

    def fields(self, model: str, data: Path) -> dict[str, Any]:
        """Return the configuration of one model's run."""
        micro = MICRO[model][self.size - 1]
        objective = {"kind": "sft"} if model == "smollm2" else {"kind": "sequence_classification"}
        return {
            "model": f"{model}@1",
            "data": {"train": str(data), "max_len": MAX_LEN[model], "truncate": "end"},
            "objective": objective,
            "adapter": LORA if self.adapter else None,
            "zero": self.zero,
            "batch": {"micro": micro, "total": micro * self.ranks},
            "run": {"workers": self.ranks, "steps": STEPS, "dtype": "float32", "threads": 1},
        }


CASES = {
    str(case): case
    for case in (
        Case(adapter, zero, ranks, size)
        for adapter in (False, True)
        for zero in (0, 2, 3)
        for ranks in (1, 2)
        for size in (1, 2)
        if not (adapter and zero == 3)
    )
}


def write_rows(model: str, path: Path) -> None:
    """Write dialogues for a decoder, texts of two kinds and one length for an encoder."""
    made = dialogues(ALPACA if ALPACA.is_file() else DEMO)[:TEXTS]
    rows: list[dict[str, Any]] = list(made)
    if model == "minilm":
        said = " ".join(row["messages"][-1]["content"] for row in made).split()
        rows = [
            {"text": " ".join(said[at : at + MAX_LEN[model]]), "label": "odd" if at % 2 else "even"}
            for at in range(TEXTS)
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def be_rank(args: argparse.Namespace) -> int:
    """Run one rank of the run in ``--run``: ``HOST:PORT/RANK`` in ``--place``."""
    from cluster.config import load
    from train_jobs import group
    from train_jobs.config import FinetuneConfig
    from train_jobs.ports import PlainWorld
    from train_jobs.runs import RunDir

    address, _, number = args.place.rpartition("/")
    run = RunDir(args.run)
    config = load(run.config, FinetuneConfig)
    place = group.Place(int(number), config.run.workers, int(number), config.run.workers, address)
    group.prepare(place, config.run)
    device = group.join(place, config.run)
    group.quiet()
    from train_jobs.fit import Fit
    from train_jobs.task import Task

    task = Task.load(config)
    import_all(task)
    baseline = resident("VmRSS")
    world = PlainWorld(place.rank, place.size, run)
    fit = Fit.begin(task, run, world, device, None, time.monotonic())
    loaded = resident("VmHWM")
    fit.train()
    trained, ended = resident("VmHWM"), resident("VmRSS")
    group.leave()
    found = {"baseline": baseline, "loaded": loaded, "peak": trained, "ended": ended}
    reply(found if place.rank == 0 else {"peak": trained, "baseline": baseline})
    return 0


def import_all(task: Any) -> None:
    """Import what loading the model would import."""
    import deepspeed
    import peft
    import transformers

    from train_jobs.objectives.open import open_objective

    del deepspeed, peft
    open_objective(task.config.model_copy(update={"objective": task.objective}))
    facts = transformers.AutoConfig.from_pretrained(task.base.path)
    for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        getattr(transformers, auto)._model_mapping.get(type(facts), None)


def resident(field: str) -> int:
    """Return bytes of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def write_run(home: Path, model: str, case: Case) -> Path:
    """Write the configuration of one case; returns its run's folder."""
    run = home / "runs" / f"{model}-{case}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(case.fields(model, home / f"{model}.jsonl")))
    return run


def measure(run: Path, case: Case, home: Path) -> dict[str, Any]:
    """Run all ranks of one case; RuntimeError with their last words when one fails."""
    env = {"ROUNDHOUSE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    told = run_ranks("benchmarks.memory", ["--run", str(run)], case.ranks, env, START_S)
    return {**told[0], "bytes": max(one["peak"] - one["baseline"] for one in told)}


def estimate(run: Path) -> Mapping[str, int]:
    """Return what the rehearsal of the same run says."""
    from cluster.config import load
    from train_jobs.config import FinetuneConfig
    from train_jobs.estimate import of_task
    from train_jobs.task import Task

    task = Task.load(load(run / "config.json", FinetuneConfig))
    return of_task(task, "float32")


def main() -> int:
    """Measure and estimate each case of each model."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", metavar="NAME=DIR,...", help="smollm2 and minilm")
    parser.add_argument("--cases", type=names_of([*CASES]), default=[*CASES], metavar="A,B")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="an earlier result: estimate its peaks anew"
    )
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return be_rank(args)
    given = dict(one.split("=", 1) for one in (args.models or "").split(",") if one)
    models = {name: Path(path) for name, path in given.items()} or {"smollm2": default_model()}
    earlier = json.loads(args.measured.read_text()) if args.measured else None
    known = earlier["config"]["parts"] if earlier else {}
    client = ClientLoad()
    samples: dict[str, dict[str, list[float]]] = {}
    parts: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="rh-memory-") as scratch:
        home = Path(scratch)
        os.environ["ROUNDHOUSE_HOME"] = scratch
        for model, path in models.items():
            publish(home, model, path)
            for name in args.cases:
                run = write_run(home, model, CASES[name])
                before = known.get(f"{model}-{name}")
                peak = before["measured"] if before else measure(run, CASES[name], home)
                told = estimate(run)
                guess = sum(told.values())
                parts[f"{model}-{name}"] = {**told, "measured": peak}
                samples.setdefault(model, {})[f"peak_bytes_{name}"] = [peak["bytes"]]
                samples[model][f"estimate_bytes_{name}"] = [guess]
                ratios[f"{model}-{name}"] = guess / peak["bytes"]
                print(
                    f"{model} {name}: {json.dumps(parts[f'{model}-{name}'])}",
                    file=sys.stderr,
                    flush=True,
                )
            mine = [abs(r - 1) for key, r in ratios.items() if key.startswith(f"{model}-")]
            ratios[f"estimate_error_{model}"] = max(mine)
            ratios[f"estimate_error_median_{model}"] = statistics.median(mine)
    config: dict[str, Any] = {"micro": MICRO, "row_tokens": MAX_LEN, "steps": STEPS, "parts": parts}
    if earlier:
        config["peaks_of"] = {"created": earlier["created"], "commit": earlier["env"]["commit"]}
    return finish("memory", args, config, samples, ratios, TARGETS, client, "fresh processes")


def publish(home: Path, model: str, path: Path) -> None:
    """Write a model and its rows into the home that all ranks share."""
    from cluster.library.manifest import Facts
    from cluster.library.store import Library

    Library(home / "library").publish(model, path, Facts())
    write_rows(model, home / f"{model}.jsonl")


if __name__ == "__main__":
    sys.exit(main())
