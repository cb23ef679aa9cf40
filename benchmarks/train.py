"""Training throughput of our step loop beside the Hugging Face Trainer, in one run.

Both train the same model on the same dialogues with the same DeepSpeed settings (rendered by our
configuration), two ranks, the same number format, optimiser and number of dialogues in a step. The
Trainer pads the dialogues of a micro-batch to the longest of them, as it does by itself; our loop
packs them. What counts are useful tokens: those of the dialogues, without padding.

    python -m benchmarks.train --json benchmarks/results/train-....json
    python -m benchmarks.train --data alpaca=FILE.json       other dialogues, under another name
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.env import ROOT
from benchmarks.harness import (
    REPLY,
    START_S,
    ClientLoad,
    Target,
    arguments,
    default_model,
    finish,
    median_ratio,
    model_label,
    reply,
)

OURS, TRAINER = "roundhouse", "hf-trainer-deepspeed"
RANKS = 2
ROWS = 2
"""Packed rows of one optimiser step, one on each rank."""
MAX_LEN = 512
WARM, MEASURED = 2, 5
STEP_S = 120.0
DEMO = ROOT / "train_jobs/data/demo/train.jsonl"
TARGETS = {"vs_hf_deepspeed_demo": Target(at_least=1.0)}


def dialogues(path: Path) -> list[dict[str, Any]]:
    """Return rows of ``{"messages": [...]}``, from JSON lines or an alpaca file."""
    text = path.read_text()
    rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    return [
        row
        if "messages" in row
        else {
            "messages": [
                {"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in rows
    ]


def prepare(home: Path, model: Path, data: Path) -> Path:
    """Make a home with the model in its library, and a training file; return the file."""
    from cluster.library.manifest import Facts
    from cluster.library.store import Library
    from cluster.text.chat import ChatText

    Library(home / "library").publish("benchmark", model, Facts())
    text = ChatText.load(model)
    rows = [r for r in dialogues(data) if len(text.encode_training(r["messages"])[0]) <= MAX_LEN]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": "benchmark@1",
        "data": {"train": str(home / "data.jsonl"), "max_len": MAX_LEN},
        "zero": 2,
        "optim": {"lr": 1e-5},
        "batch": {"micro": 1, "total": ROWS},
        "run": {"workers": RANKS, "steps": WARM + MEASURED},
    }
    path = home / "train.yaml"
    path.write_text(json.dumps(config))
    return path


def ours(task: Any, device: Any, rank: int, home: Path) -> dict[str, Any]:
    """Run our own loop; returns seconds and useful tokens of each measured step."""
    from train_jobs.loop import documents_of
    from train_jobs.ports import PlainWorld
    from train_jobs.rank import Fit
    from train_jobs.runs import RunDir

    steps: list[float] = []

    class Recording(PlainWorld):
        def report(self, metrics: Mapping[str, Any]) -> None:
            if "step_s" in metrics:
                steps.append(metrics["step_s"])

    run = RunDir(home / "run")
    run.path.mkdir(exist_ok=True)
    fit = Fit.begin(task, run, Recording(rank, RANKS, run), device, None, time.monotonic())
    fit.train()
    tokens = [
        sum(len(document.ids) for document in documents_of(task.train, task.order.step(step)))
        for step in range(WARM + MEASURED)
    ]
    return {"step_s": steps[WARM:], "tokens": tokens[WARM:], "engine": dict(fit.record)}


def trainer(task: Any, device: Any, rank: int, home: Path) -> dict[str, Any]:
    """Run the Trainer over the same documents in file order."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    documents = [document for row in task.train.rows for document in row]
    micro = round(len(documents) / len(task.train.rows) * ROWS / RANKS)
    rows = [
        {
            "ids": d.ids,
            "labels": [i if on else -100 for i, on in zip(d.ids, d.trained, strict=True)],
        }
        for d in documents
    ]

    def pad(batch: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["ids"]) for row in batch)
        short = [longest - len(row["ids"]) for row in batch]
        pairs = list(zip(batch, short, strict=True))
        return {
            "input_ids": torch.tensor([[*r["ids"], *[0] * n] for r, n in pairs]),
            "labels": torch.tensor([[*r["labels"], *[-100] * n] for r, n in pairs]),
            "attention_mask": torch.tensor([[1] * len(r["ids"]) + [0] * n for r, n in pairs]),
        }

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    steps: list[float] = []

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append(time.monotonic() - self.began)

    rendered = task.config.deepspeed(device.dtype, on_gpu=device.name != "cpu")
    rendered["train_micro_batch_size_per_gpu"] = micro
    rendered["zero_force_ds_cpu_optimizer"] = False
    arguments = TrainingArguments(
        output_dir=str(home / f"trainer-{rank}"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=1,
        max_steps=WARM + MEASURED,
        learning_rate=task.config.optim.lr,
        max_grad_norm=task.config.optim.clip,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        deepspeed=rendered,
        dataloader_pin_memory=False,
        bf16=device.dtype == "bfloat16",
    )
    model = AutoModelForCausalLM.from_pretrained(
        task.base.path,
        dtype=getattr(torch, device.dtype),
        trust_remote_code=False,
        use_safetensors=True,
    )
    running = InOrder(
        model=model, args=arguments, train_dataset=rows, data_collator=pad, callbacks=[Clock()]
    )
    running.train()
    engine = type(running.model_wrapped).__name__
    if engine != "DeepSpeedEngine":
        raise RuntimeError(f"the Trainer ran {engine}, not DeepSpeed")
    whole = micro * RANKS
    sizes = [len(document.ids) for document in documents]
    tokens = [sum(sizes[step * whole : (step + 1) * whole]) for step in range(WARM + MEASURED)]
    found = {
        "engine": engine,
        "zero_stage": running.model_wrapped.zero_optimization_stage(),
        "dialogues_per_rank": micro,
        "dtype": str(next(model.parameters()).dtype),
    }
    return {"step_s": steps[WARM:], "tokens": tokens[WARM:], "engine": found}


SIDES = {OURS: ours, TRAINER: trainer}


def be_rank(args: argparse.Namespace) -> int:
    """Be one rank of one side: ``HOST:PORT/RANK`` in ``--place``."""
    from cluster.config import load
    from train_jobs import group
    from train_jobs.config import FinetuneConfig
    from train_jobs.task import Task

    address, _, rank = args.place.rpartition("/")
    home = Path(os.environ["ROUNDHOUSE_HOME"])
    config = load(home / "train.yaml", FinetuneConfig)
    place = group.Place(int(rank), RANKS, int(rank), RANKS, address)
    group.prepare(place, config.run)
    device = group.join(place, config.run)
    group.quiet()
    told = SIDES[args.side](Task.load(config), device, int(rank), home)
    if int(rank) == 0:
        reply(told)
    group.leave()
    return 0


def measure(side: str, home: Path, threads: int) -> dict[str, Any]:
    """Run all ranks of one side once; RuntimeError with its last words when one fails."""
    from train_jobs.group import free_address

    address = free_address()
    env = os.environ | {"ROUNDHOUSE_HOME": str(home), "OMP_NUM_THREADS": str(threads // RANKS or 1)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train", "--side", side]
            + ["--place", f"{address}/{rank}"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        bound = START_S + STEP_S * (WARM + MEASURED)
        said = [rank.communicate(timeout=bound)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for line in said[0].splitlines():
        if line.startswith(REPLY):
            told: dict[str, Any] = json.loads(line.removeprefix(REPLY))
            return told
    raise RuntimeError(f"{side} gave no result:\n" + "\n".join(said)[-3000:])


def main() -> int:
    """Measure both sides in alternating rounds."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", default=f"demo={DEMO}", metavar="NAME=FILE")
    parser.add_argument("--place", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return be_rank(args)
    name, _, file = args.data.partition("=")
    model = args.model or default_model()
    client = ClientLoad()
    samples: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    engines: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rh-bench-") as scratch:
        prepare(Path(scratch), model, Path(file))
        for number in range(args.rounds):
            for side in list(SIDES) if number % 2 == 0 else list(reversed(SIDES)):
                told = measure(side, Path(scratch), args.threads)
                speed = sum(told["tokens"]) / sum(told["step_s"])
                mine = samples[side]
                mine.setdefault("useful_tokens_per_s", []).append(speed)
                mine.setdefault("step_s", []).extend(told["step_s"])
                mine.setdefault("tokens_per_step", []).extend(told["tokens"])
                engines[side] = told["engine"]
                line = f"round {number + 1} {side}: {speed:.1f} useful tokens/s"
                print(line, file=sys.stderr, flush=True)
    ratios = {
        f"vs_hf_deepspeed_{name}": median_ratio(samples, "useful_tokens_per_s", OURS, TRAINER)
    }
    config = {
        "model": model_label(model),
        "data": name,
        "ranks": RANKS,
        "max_len": MAX_LEN,
        "steps": MEASURED,
        "warm_up_steps": WARM,
        "rounds": args.rounds,
        "engines": engines,
    }
    return finish("train", args, config, samples, ratios, TARGETS, client, "warm after two steps")


if __name__ == "__main__":
    sys.exit(main())
