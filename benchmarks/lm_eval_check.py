"""lm-evaluation-harness scores a multiple-choice task through ``/v1/completions``, and by itself.

The whole of Roundhouse serves a model; lm-evaluation-harness (from the environment that `make
bench-peers` makes) scores the task in ``benchmarks/lm_eval/`` through it, with token-id prompts,
``echo`` and ``logprobs``, and once more with its own ``hf`` backend on the same directory in the
same number format. Scores must be equal and log-likelihoods close.

    python -m benchmarks.lm_eval_check --json benchmarks/results/lm-eval-....json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.env import ROOT
from benchmarks.harness import ClientLoad, Target, arguments, default_model, end_properly, finish
from benchmarks.load import Endpoint
from benchmarks.peers.environments import BASE, LM_EVAL, missing
from benchmarks.servers import Setup, ours

TASKS = ROOT / "benchmarks" / "lm_eval"
TASK = "general_knowledge"
OURS, PEER = "roundhouse", "lm-eval-hf"
RUN_S = 900.0
AT_ONCE = 4
METRICS = ("acc", "acc_norm")
TARGETS = {
    "lm_eval_scores_equal": Target(at_least=1.0),
    "lm_eval_loglikelihood_diff": Target(at_most=0.001),
}


def main() -> int:
    """Score both ways and compare."""
    args = parse()
    end_properly()
    if why := missing(LM_EVAL):
        print(f"error: {why}", file=sys.stderr)
        return 1
    client = ClientLoad()
    model = (args.model or default_model()).resolve()
    with ours(Setup(model, args.threads, args.dtype)) as running:
        through = score(*through_http(running.endpoint, model))
    itself = score(*by_itself(model, args.dtype), {"OMP_NUM_THREADS": str(args.threads)})
    samples = {OURS: through, PEER: itself}
    config = {
        "task": TASK,
        "items": len(itself["loglikelihood"]),
        "dtype": args.dtype,
        "peers": LM_EVAL.versions(),
    }
    return finish(
        "lm_eval_check", args, config, samples, compare(through, itself), TARGETS, client, "cold"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args(argv)


def through_http(endpoint: Endpoint, model: Path) -> tuple[list[str], dict[str, str]]:
    """Return the harness's arguments for our endpoint, and what its environment must hold."""
    told = {
        "model": endpoint.model,
        "base_url": f"{endpoint.url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(model),
        "tokenized_requests": True,
        "num_concurrent": AT_ONCE,
        "max_retries": 1,
    }
    return ["local-completions", pairs(told)], {"OPENAI_API_KEY": endpoint.key}


def by_itself(model: Path, dtype: str) -> tuple[list[str], dict[str, str]]:
    """Return the harness's arguments for its own backend."""
    return ["hf", pairs({"pretrained": model, "dtype": dtype})], {}


def pairs(values: Mapping[str, Any]) -> str:
    """Return ``a=1,b=2`` as the harness reads it."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def score(
    model: Sequence[str], secrets: Mapping[str, str], environ: Mapping[str, str] | None = None
) -> dict[str, list[float]]:
    """Run the harness once; return its scores and each choice's log-likelihood, in order."""
    name, model_args = model
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(BASE / "lm-eval-cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with TemporaryDirectory() as out:
        command = [
            *(str(LM_EVAL.python), "-m", "lm_eval", "--model", name, "--model_args", model_args),
            *("--include_path", str(TASKS), "--tasks", TASK, "--batch_size", "1"),
            *("--device", "cpu"),
            *("--log_samples", "--output_path", out),
        ]
        print("$ " + " ".join(command), file=sys.stderr, flush=True)
        subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | offline | dict(environ or {}) | dict(secrets),
            stdout=sys.stderr,
            check=True,
            timeout=RUN_S,
        )
        return read(Path(out))


def read(out: Path) -> dict[str, list[float]]:
    """Read what one run of the harness wrote."""
    (results,) = out.rglob("results_*.json")
    (items,) = out.rglob("samples_*.jsonl")
    scores = json.loads(results.read_text())["results"][TASK]
    rows = sorted(map(json.loads, items.read_text().splitlines()), key=lambda row: row["doc_id"])
    told: dict[str, list[float]] = {name: [float(scores[f"{name},none"])] for name in METRICS}
    # of each item its choices, of each choice (log-likelihood, whether it is the greedy answer)
    choices = [choice for row in rows for choice in row["filtered_resps"]]
    told["loglikelihood"] = [float(likelihood) for likelihood, _ in choices]
    told["greedy"] = [float(str(greedy) == "True") for _, greedy in choices]
    return told


def compare(ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]]) -> dict[str, float]:
    """Return 1 where all scores are equal, and the largest difference of a log-likelihood."""
    exact = (*METRICS, "greedy")
    both = zip(ours["loglikelihood"], theirs["loglikelihood"], strict=True)
    return {
        "lm_eval_scores_equal": float(all(ours[name] == theirs[name] for name in exact)),
        "lm_eval_loglikelihood_diff": max(abs(a - b) for a, b in both),
    }


if __name__ == "__main__":
    sys.exit(main())
