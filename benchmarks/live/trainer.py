"""From a run's last optimiser step to the first token of its weights, and the same by files."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import repeat
from typing import Any

from benchmarks.env import ROOT
from benchmarks.live.rig import NAME, Rig
from benchmarks.live.updates import Load, Samples, say
from benchmarks.load import Endpoint
from benchmarks.peers.environments import BASE, VLLM, missing
from benchmarks.servers import Setup, vllm_server
from cluster.library.ref import NEWEST
from cluster.library.store import Library
from train_jobs.live import run_word

STEPS, EVERY = 6, 3
"""A run puts its weights on the shelf twice: cold, and as all the others of a longer run."""
RUN_S = 900.0
CLIENTS = 1
QUESTION = "Hi"
"""What it asks, for one token, again and again: a long prompt would measure its own prefill."""
DATA = ROOT / "train_jobs/data/demo/train.jsonl"
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"kind": "lora", "r": 8, "dropout": 0.0}},
}


def measure_trainer(rig: Rig, args: argparse.Namespace) -> dict[str, Samples]:
    """Train a few steps in each way beside a replica that answers; then restart instead."""
    found: dict[str, Samples] = {}
    with rig.deployed(replicas=1, streams=CLIENTS) as endpoint:
        for name, changes in WAYS.items():
            told: Samples = {}
            for _ in range(args.rounds):
                for figure, value in one_run(rig, endpoint, changes).items():
                    told.setdefault(figure, []).append(value)
                say(f"{name}: {told['to_first_token_s'][-1]:.2f} s from step to first token")
            found[f"trainer-{name}"] = told
    found["restarts"] = restarts(rig, args)
    return found


def one_run(rig: Rig, endpoint: Endpoint, changes: dict[str, Any]) -> dict[str, float]:
    """Train; return seconds from a step to the shelf, and to the first token of its weights.

    ``cold_`` is the run's first time, when nothing has travelled yet between these processes.
    """
    fields = {
        "model": answering(rig),
        "data": {"train": str(DATA), "max_len": 128},
        "batch": {"micro": 1, "total": 2},
        "run": {"workers": 2, "steps": STEPS, "dtype": "float32", "threads": 1},
        "publish": {"name": NAME, "every": EVERY},
        **changes,
    }
    config = BASE / "live-train.yaml"
    config.write_text(json.dumps(fields))
    before = {path.name for path in (rig.home / "runs").glob("*")}
    with Load(endpoint, CLIENTS, 1, repeat(QUESTION)) as load:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", "train", str(config), "--force"],
            cwd=ROOT, env=rig.environ, stdout=subprocess.DEVNULL, timeout=RUN_S,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the run ended with {done.returncode}")
    [run] = [path for path in (rig.home / "runs").glob("*") if path.name not in before]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {"failures": float(len(load.failures))}
    for step, prefix in ((EVERY, "cold_"), (STEPS, "")):
        stepped = next(r["time"] for r in records if r.get("step") == step and "loss" in r)
        live = next(r for r in records if r.get("event") == "live" and r["step"] == step)
        new = {f"{NAME}@run.{run_word(run.name)}.{step}"}
        assert live["ref"] in new
        if step == STEPS:
            # what the run publishes then is the same weights, and may answer before anybody asks
            new.add(next(r["ref"] for r in records if r.get("event") == "published"))
        offset = time.time() - time.monotonic()
        first = min(
            answer.sent + answer.first_s + offset
            for _, answer in load.answers
            if new.issuperset(answer.versions)
        )
        told[f"{prefix}to_shelf_s"] = live["time"] - stepped
        told[f"{prefix}to_first_token_s"] = first - stepped
    return told


def answering(rig: Rig) -> str:
    """Return the library's version that the deployed model answers with between two runs."""
    return f"{NAME}@{Library(rig.home / 'library').aliases(NAME).get(NEWEST, 1)}"


def restarts(rig: Rig, args: argparse.Namespace) -> Samples:
    """Start a server on new files instead: ours, and vLLM's, each from nothing to a first token.

    Once: it takes several times as long.
    """
    told: Samples = {}
    began = time.monotonic()
    with rig.deployed(replicas=1, streams=CLIENTS):
        told["restart_s_file"] = [time.monotonic() - began]
    if missing(VLLM) is None:
        with vllm_server(Setup(args.model, args.threads, "float32")) as running:
            told["restart_s_vllm"] = [running.ready_s]
    return told
