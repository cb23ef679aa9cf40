"""Serving throughput of the bare engine beside others, offline, in one run.

Sides: our engine (one rank, a plain process) in full and, where it can, with int8 weights;
transformers' continuous batching, and its ``generate`` on a padded batch; vLLM's CPU build, from
the environment that `make bench-peers` makes. The same prompts as token ids, greedy, a fixed
number of new tokens each (no side stops early), the same threads. Time runs from the first
request to the last token.

Workloads: short questions at 1, 8, 32 and 64 at once with 64 new tokens; chat-like lengths (many
short, a few long) at 32; eight contexts of 2,000 tokens. Starts run from the process's creation to
its first token; vLLM starts once with an empty compile cache and once with the one it left.

    python -m benchmarks.serve --json benchmarks/results/serve-....json
    python -m benchmarks.serve --sides roundhouse,vllm-float32 --workloads c1,c8 --rounds 1
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    ClientLoad,
    Side,
    Target,
    arguments,
    default_model,
    end_properly,
    finish,
    median_ratio,
    model_label,
    names_of,
    questions,
    reply,
)
from benchmarks.peers import vllm_offline
from benchmarks.peers.environments import BASE, VLLM, missing, vllm_environ
from benchmarks.workloads import (
    Workload,
    corpus,
    demo_questions,
    fixed,
    long_context,
    mix,
    turn,
)

OURS, INT8 = "roundhouse", "roundhouse-int8"
BATCHING, GENERATE = "transformers-cb", "transformers-generate"
VLLMS = {"vllm-bfloat16": "bfloat16", "vllm-float32": "float32"}
"""vLLM in both number formats: which one is faster depends on the processor, and the ratios
against it compare with the faster one of each workload."""
CONCURRENCY = (1, 8, 32, 64)
NEW_TOKENS = 64
SPEED = "tokens_per_s_"
MIX = 32
LONG, CONTEXT_TOKENS, LONG_ANSWER = 8, 2000, 32
NAMES = (*(f"c{count}" for count in CONCURRENCY), f"mix_c{MIX}", f"long_c{LONG}")
MAX_LEN = 2048
CACHE_TOKENS = 64 * 512
TARGETS = {
    "vs_transformers_cb_c8": Target(at_least=1.8),
    "vs_transformers_cb_c32": Target(at_least=2.2),
    "vs_vllm_c1": Target(at_least=1.0),
    "vs_vllm_c8": Target(at_least=1.0),
    "vs_vllm_c32": Target(at_least=1.0),
    "vs_vllm_int8_c1": Target(at_least=1.3),
    "start_vs_vllm_cold": Target(at_least=10.0),
    "long_context_vs_vllm": Target(at_least=0.8),
}
Answer = Callable[[Sequence[Sequence[int]], Sequence[int]], dict[str, Any]]
Samples = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Setup:
    """What every side is started with."""

    model: Path
    threads: int
    dtype: str
    """``auto``: each side's own choice here."""
    quantization: str | None = None
    max_concurrent: int = max(CONCURRENCY)


def ours(setup: Setup) -> tuple[float, Answer]:
    """Start our engine; returns its start in seconds and what answers a batch."""
    from serve_apps.config import Sharded
    from serve_apps.engine.interface import EngineRequest, Sampling
    from serve_apps.engine.sharded import ShardedEngine

    config = Sharded.model_validate(
        {
            "host": "process",
            "threads": setup.threads,
            "dtype": setup.dtype,
            "max_model_len": MAX_LEN,
            "max_concurrent": setup.max_concurrent,
            "max_queued": 0,
            "cache_tokens": CACHE_TOKENS,
            **({"quantization": setup.quantization} if setup.quantization else {}),
        }
    )
    loop = asyncio.new_event_loop()
    began = time.monotonic()

    async def start() -> ShardedEngine:
        engine = ShardedEngine(config)
        await engine.start()
        await engine.load("m@1", str(setup.model))
        await engine.activate("m@1")
        return engine

    engine = loop.run_until_complete(start())
    started = time.monotonic() - began

    async def one(number: int, ids: Sequence[int], new: int) -> tuple[float, int]:
        request = EngineRequest(f"b{number}", tuple(ids), new, Sampling(temperature=0.0))
        first, count = 0.0, 0
        async for chunk in engine.generate(request):
            first = first or time.monotonic()
            count += len(chunk.token_ids)
        return first, count

    def answer(prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> dict[str, Any]:
        began = time.monotonic()

        async def run() -> list[tuple[float, int]]:
            batch = enumerate(zip(prompts, answers, strict=True))
            return await asyncio.gather(*(one(i, ids, new) for i, (ids, new) in batch))

        told = loop.run_until_complete(run())
        seconds = time.monotonic() - began
        firsts = [(first - began) * 1000 for first, _ in told]
        return {"seconds": seconds, "tokens": sum(n for _, n in told), "ttft_ms": firsts}

    return started, answer


def loaded(setup: Setup, attention: str) -> Any:
    """Return transformers' own model, in the number format that our engine picks if none is said.

    The checkpoint's own bfloat16 would make it crawl where the processor is slow at it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from cluster.device import resolve_dtype

    torch.set_num_threads(setup.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = AutoModelForCausalLM.from_pretrained(
        setup.model,
        dtype=getattr(torch, resolve_dtype(setup.dtype, device)),
        attn_implementation=attention,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return module.to(device).eval()


def batching(setup: Setup) -> tuple[float, Answer]:
    """Load transformers' continuous batching; its manager lives as long as the side."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    began = time.monotonic()
    module = loaded(setup, "sdpa")
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    manager = module.init_continuous_batching(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=CACHE_TOKENS // 256, max_batch_tokens=512, use_cuda_graph=False
        ),
    )
    manager.start()
    started = time.monotonic() - began

    def answer(prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> dict[str, Any]:
        began = time.monotonic()
        for ids, new in zip(prompts, answers, strict=True):
            manager.add_request(list(ids), max_new_tokens=new)
        tokens, waiting = 0, len(prompts)
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


def generate(setup: Setup) -> tuple[float, Answer]:
    """Load the model for ``generate`` on one left-padded batch; all answers of one length."""
    import torch

    began = time.monotonic()
    module = loaded(setup, "sdpa")
    started = time.monotonic() - began

    def answer(prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> dict[str, Any]:
        longest, new = max(map(len, prompts)), max(answers)
        rows = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        began = time.monotonic()
        with torch.inference_mode():
            module.generate(
                rows.to(module.device),
                attention_mask=mask.to(module.device),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
        # what was generated beyond a request's own length helps nobody and does not count
        return {"seconds": time.monotonic() - began, "tokens": sum(answers), "ttft_ms": []}

    return started, answer


def int8(setup: Setup) -> tuple[float, Answer]:
    """Start our engine with weights of eight bits."""
    return ours(replace(setup, quantization="int8"))


def vllm(dtype: str) -> Callable[[Setup], tuple[float, Answer]]:
    """Return what starts vLLM's CPU build; it runs in its own environment."""
    return lambda setup: vllm_offline.load(setup.model, dtype, MAX_LEN, setup.max_concurrent)


SIDES: Mapping[str, Callable[[Setup], tuple[float, Answer]]] = {
    OURS: ours,
    INT8: int8,
    BATCHING: batching,
    GENERATE: generate,
    **{name: vllm(dtype) for name, dtype in VLLMS.items()},
}
SKIPS = {
    INT8: ("c8", "c32", "c64", f"mix_c{MIX}", f"long_c{LONG}"),
    BATCHING: ("c64", f"long_c{LONG}"),
    GENERATE: ("c64", f"mix_c{MIX}", f"long_c{LONG}"),
}
"""Workloads that cost a side minutes and answer no question."""


def unavailable(name: str, dtype: str) -> str | None:
    """Say why a side is not part of this run, if so."""
    if name in VLLMS and dtype not in ("auto", VLLMS[name]):
        return f"--dtype {dtype}"
    if name in VLLMS:
        return missing(VLLM)
    if name == INT8:
        from serve_apps.config import Sharded

        return None if "quantization" in Sharded.model_fields else "the engine has no int8 yet"
    return None


def compile_cache(name: str) -> Path:
    """Return where a vLLM side keeps what it compiles."""
    return BASE / "compiled" / name


def start_side(name: str, args: argparse.Namespace) -> Side:
    """Start a side in its own process and environment."""
    argv = ["--model", str(args.model), "--threads", str(args.threads), "--dtype", args.dtype]
    if name not in VLLMS:
        return Side("benchmarks.serve", name, argv, args.threads)
    environ = vllm_environ(compile_cache(name), args.threads)
    return Side("benchmarks.serve", name, argv, args.threads, VLLM.python, environ)


def be_side(args: argparse.Namespace) -> int:
    """Be one side: start, generate one token, say how long that took, answer each question."""
    import psutil

    setup = Setup(args.model, args.threads, args.dtype)
    started, answer = SIDES[args.side](setup)
    answer([[1, 2, 3, 4]], [1])
    since_birth = time.time() - psutil.Process().create_time()
    reply({"started_s": started, "first_token_s": since_birth})
    for question in questions():
        reply(answer(question["prompts"], question["answers"]))
    return 0


def workloads(model: Path, number: int, names: Sequence[str]) -> list[Workload]:
    """Return what is asked in a round; every round asks something else, of the same sizes."""
    from cluster.text.chat import ChatText

    text = ChatText.load(model)
    asked, tokens = demo_questions(), corpus(lambda s: list(text.encode(s)))
    chats = {
        f"c{count}": [
            list(text.encode_chat([{"role": "user", "content": q}]))
            for q in turn(asked, number * len(CONCURRENCY) + place, count)
        ]
        for place, count in enumerate(CONCURRENCY)
    }
    every = [fixed(prompts, NEW_TOKENS) for prompts in chats.values()]
    every.append(mix(tokens, MIX, number))
    every.append(long_context(tokens, LONG, CONTEXT_TOKENS, LONG_ANSWER, number))
    return [load for load in every if load.name in names]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sides", type=names_of([*SIDES]), default=[*SIDES], metavar="A,B")
    parser.add_argument("--workloads", type=names_of(NAMES), default=[*NAMES], metavar="A,B")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--no-cold", action="store_true", help="skip vLLM's start from nothing")
    return parser.parse_args(argv)


def main() -> int:
    """Measure all sides in alternating rounds."""
    args = parse()
    if args.side:
        return be_side(args)
    args.model = args.model or default_model()
    end_properly()
    client = ClientLoad()
    sides: list[Side] = []
    samples: Samples = {}
    try:
        for name in args.sides:
            if why := unavailable(name, args.dtype):
                tell(f"{name} is left out: {why}")
                continue
            tell(f"starting {name}")
            samples[name] = {}
            if name in VLLMS and not args.no_cold:
                shutil.rmtree(compile_cache(name), ignore_errors=True)
                cold = start_side(name, args)
                samples[name]["start_cold_s"] = [cold.ready["first_token_s"]]
                cold.close()
            sides.append(start_side(name, args))
            samples[name]["start_s"] = [sides[-1].ready["first_token_s"]]
        for number in range(-1, args.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                measure(side, args, number, samples[side.name])
    finally:
        for side in sides:
            side.close()
    config = {
        "model": model_label(args.model),
        "new_tokens": NEW_TOKENS,
        "workloads": {load.name: shape(load) for load in workloads(args.model, 0, args.workloads)},
        "rounds": args.rounds,
        "dtype": args.dtype,
        "sampling": "greedy",
        "peers": VLLM.versions(),
    }
    warmth = "warm, one round before; starts as their names say"
    return finish("serve", args, config, samples, ratios(samples), TARGETS, client, warmth)


def tell(line: str) -> None:
    """Print progress where it does not mix with the result."""
    print(line, file=sys.stderr, flush=True)


def shape(load: Workload) -> dict[str, int]:
    """Return what a result says about a workload."""
    return {
        "requests": len(load.prompts),
        "prompt_tokens": sum(map(len, load.prompts)),
        "new_tokens": sum(load.answers),
    }


def measure(side: Side, args: argparse.Namespace, number: int, samples: dict[str, Any]) -> None:
    """Ask one side for everything; round -1 warms it and is not counted."""
    for load in workloads(args.model, number + 1, args.workloads):
        if load.name in SKIPS.get(side.name, ()):
            continue
        told = side.ask(prompts=load.prompts, answers=load.answers)
        speed = told["tokens"] / told["seconds"]
        tell(f"round {number + 1} {side.name} {load.name}: {speed:.1f} tokens/s")
        if number < 0:
            continue
        samples.setdefault(SPEED + load.name, []).append(speed)
        if told["ttft_ms"]:
            samples.setdefault(f"ttft_ms_{load.name}", []).extend(told["ttft_ms"])


def ratios(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return everything that can be compared in what was measured."""
    found: dict[str, float] = {}
    if OURS not in samples:
        return found
    for peer in samples.keys() - {OURS, INT8}:
        for figure in samples[peer].keys() & samples[OURS].keys():
            if figure.startswith(SPEED):
                load = figure.removeprefix(SPEED)
                ratio = median_ratio(samples, figure, OURS, peer)
                found[f"vs_{peer.replace('-', '_')}_{load}"] = ratio
    found |= against_vllm(samples, {name: samples[name] for name in VLLMS if name in samples})
    return dict(sorted(found.items()))


def against_vllm(
    samples: Mapping[str, Mapping[str, Sequence[float]]],
    peers: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, float]:
    """Return our ratios to vLLM, in each workload to the number format in which it is faster."""
    found: dict[str, float] = {}
    if not peers:
        return found

    def best(figure: str) -> float:
        return max(statistics.median(side[figure]) for side in peers.values())

    for load in NAMES:
        figure = SPEED + load
        if figure in samples[OURS] and all(figure in side for side in peers.values()):
            name = "long_context_vs_vllm" if load == f"long_c{LONG}" else f"vs_vllm_{load}"
            found[name] = statistics.median(samples[OURS][figure]) / best(figure)
    if mine := samples.get(INT8, {}).get(f"{SPEED}c1"):
        found["vs_vllm_int8_c1"] = statistics.median(mine) / best(f"{SPEED}c1")
    start = samples[OURS]["start_s"][0]
    for name, figure in (("cold", "start_cold_s"), ("warm", "start_s")):
        times = [side[figure][0] for side in peers.values() if figure in side]
        if times:
            found[f"start_vs_vllm_{name}"] = min(times) / start
    return found


if __name__ == "__main__":
    sys.exit(main())
