"""Serving throughput of the bare engine beside transformers, in one run.

Sides: our engine (one rank, a plain process), transformers' continuous batching, and its
``generate`` on a padded batch. The same questions, 1, 8 and 32 at once, greedy, a fixed number of
new tokens each (no side stops early), the same number format and threads. Time runs from the
first request to the last token.

    python -m benchmarks.serve --json benchmarks/results/serve-....json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    ClientLoad,
    Side,
    Target,
    arguments,
    default_model,
    finish,
    median_ratio,
    questions,
    reply,
)

OURS, BATCHING, GENERATE = "roundhouse", "transformers-cb", "transformers-generate"
CONCURRENCY = (1, 8, 32)
NEW_TOKENS = 64
SLOT_TOKENS = 512
DATA = Path(__file__).resolve().parent.parent / "train_jobs/data/demo/train.jsonl"
TARGETS = {
    "vs_transformers_cb_c8": Target(at_least=1.0),
    "vs_transformers_cb_c32": Target(at_least=1.0),
    "vs_transformers_generate_c1": Target(at_least=1.0),
}


def prompts(model: Path, count: int) -> list[list[int]]:
    """Return the demo data's first questions as chat prompts, as token ids."""
    from cluster.text.chat import ChatText

    text = ChatText.load(model)
    rows = [json.loads(line) for line in DATA.read_text().splitlines()[:count]]
    return [list(text.encode_chat(row["messages"][:1])) for row in rows]


def ours(model: Path, threads: int) -> tuple[float, Callable[[list[list[int]]], Any]]:
    """Start our engine; returns its start in seconds and what answers a batch."""
    from serve_apps.config import Sharded
    from serve_apps.engine.interface import EngineRequest, Sampling
    from serve_apps.engine.sharded import ShardedEngine

    config = Sharded(
        host="process",
        threads=threads,
        max_model_len=SLOT_TOKENS,
        max_concurrent=max(CONCURRENCY),
        max_queued=0,
    )
    loop = asyncio.new_event_loop()
    began = time.monotonic()

    async def start() -> ShardedEngine:
        engine = ShardedEngine(config)
        await engine.start()
        await engine.load("m@1", str(model))
        await engine.activate("m@1")
        return engine

    engine = loop.run_until_complete(start())
    started = time.monotonic() - began

    async def one(number: int, ids: list[int]) -> tuple[float, int]:
        request = EngineRequest(f"b{number}", tuple(ids), NEW_TOKENS, Sampling(temperature=0.0))
        first, count = 0.0, 0
        async for chunk in engine.generate(request):
            first = first or time.monotonic()
            count += len(chunk.token_ids)
        return first, count

    def answer(batch: list[list[int]]) -> dict[str, Any]:
        began = time.monotonic()

        async def run() -> list[tuple[float, int]]:
            return await asyncio.gather(*(one(i, ids) for i, ids in enumerate(batch)))

        told = loop.run_until_complete(run())
        seconds = time.monotonic() - began
        firsts = [(first - began) * 1000 for first, _ in told]
        return {"seconds": seconds, "tokens": sum(n for _, n in told), "ttft_ms": firsts}

    return started, answer


def loaded(model: Path, threads: int, attention: str) -> Any:
    """Return transformers' own model in the number format that our engine picks here."""
    import torch
    from transformers import AutoModelForCausalLM

    from cluster.device import resolve_dtype

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=getattr(torch, resolve_dtype("auto", device)),
        attn_implementation=attention,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return module.to(device).eval()


def batching(model: Path, threads: int) -> tuple[float, Callable[[list[list[int]]], Any]]:
    """Load transformers' continuous batching; its manager lives as long as the side."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    began = time.monotonic()
    module = loaded(model, threads, "sdpa")
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    manager = module.init_continuous_batching(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=96, max_batch_tokens=512, use_cuda_graph=False
        ),
    )
    manager.start()
    started = time.monotonic() - began

    def answer(batch: list[list[int]]) -> dict[str, Any]:
        began = time.monotonic()
        for ids in batch:
            manager.add_request(ids, max_new_tokens=NEW_TOKENS)
        tokens, waiting = 0, len(batch)
        while waiting:
            done = manager.get_result(timeout=1.0)
            if done is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching has stopped")
                continue
            if done.is_finished():
                tokens += len(done.generated_tokens)
                waiting -= 1
        return {"seconds": time.monotonic() - began, "tokens": tokens, "ttft_ms": []}

    return started, answer


def generate(model: Path, threads: int) -> tuple[float, Callable[[list[list[int]]], Any]]:
    """Load the model for ``generate`` on one left-padded batch."""
    import torch

    began = time.monotonic()
    module = loaded(model, threads, "sdpa")
    started = time.monotonic() - began

    def answer(batch: list[list[int]]) -> dict[str, Any]:
        longest = max(map(len, batch))
        rows = torch.tensor([[0] * (longest - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
        began = time.monotonic()
        with torch.inference_mode():
            out = module.generate(
                rows.to(module.device),
                attention_mask=mask.to(module.device),
                do_sample=False,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        seconds = time.monotonic() - began
        return {"seconds": seconds, "tokens": out[:, longest:].numel(), "ttft_ms": []}

    return started, answer


SIDES = {OURS: ours, BATCHING: batching, GENERATE: generate}


def be_side(args: argparse.Namespace) -> int:
    """Be one side: warm up, say so, then answer each question."""
    texts = prompts(args.model, max(CONCURRENCY))
    started, answer = SIDES[args.side](args.model, args.threads)
    for count in CONCURRENCY:
        answer(texts[:count])
    reply({"started_s": started})
    for question in questions():
        reply(answer(texts[: question["count"]]))
    return 0


def main() -> int:
    """Measure all sides in alternating rounds."""
    parser = arguments(__doc__ or "")
    args = parser.parse_args()
    if args.side:
        return be_side(args)
    args.model = args.model or default_model()
    argv = ["--model", str(args.model), "--threads", str(args.threads)]
    client = ClientLoad()
    sides: list[Side] = []
    samples: dict[str, dict[str, list[float]]] = {}
    try:
        for name in SIDES:
            print(f"starting {name}", file=sys.stderr, flush=True)
            sides.append(Side("benchmarks.serve", name, argv, args.threads))
            samples[name] = {"start_s": [sides[-1].ready["started_s"]]}
        for number in range(args.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                for count in CONCURRENCY:
                    told = side.ask(count=count)
                    speed = told["tokens"] / told["seconds"]
                    mine = samples[side.name]
                    mine.setdefault(f"tokens_per_s_c{count}", []).append(speed)
                    if told["ttft_ms"]:
                        mine.setdefault(f"ttft_ms_c{count}", []).extend(told["ttft_ms"])
                    line = f"round {number + 1} {side.name} c{count}: {speed:.1f} tokens/s"
                    print(line, file=sys.stderr, flush=True)
    finally:
        for side in sides:
            side.close()
    ratios = {
        f"vs_{peer.replace('-', '_')}_c{count}": median_ratio(
            samples, f"tokens_per_s_c{count}", OURS, peer
        )
        for peer in (BATCHING, GENERATE)
        for count in CONCURRENCY
    }
    config = {
        "model": args.model.parent.parent.name if args.model.name.isdigit() else args.model.name,
        "new_tokens": NEW_TOKENS,
        "concurrency": CONCURRENCY,
        "rounds": args.rounds,
        "sampling": "greedy",
    }
    return finish("serve", args, config, samples, ratios, TARGETS, client, "warm, one round before")


if __name__ == "__main__":
    sys.exit(main())
