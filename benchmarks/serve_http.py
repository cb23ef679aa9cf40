"""Whole products through HTTP: streaming chat completions, one product at a time.

Sides: Roundhouse (cluster, gateway, key check, release routing, replica, rank) as it comes and
with a chunk for each token, vLLM's OpenAI server, ray.serve.llm, ``transformers serve
--continuous-batching``, and our bare engine as what HTTP costs us. The same model, questions and
answer lengths, greedy, 1, 8 and 32 at once; each side has the machine to itself, and all go over
loopback. The peers come from `make bench-peers`; one that is not there is left out, and the ratios
against it are missing.

    python -m benchmarks.serve_http --json benchmarks/results/serve-http-....json
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence

from benchmarks.harness import (
    ClientLoad,
    Side,
    Target,
    arguments,
    default_model,
    distribution,
    end_properly,
    finish,
    median_ratio,
    model_label,
    names_of,
)
from benchmarks.load import Burst, stream
from benchmarks.peers.environments import VLLM, missing
from benchmarks.servers import SERVERS, Running, Setup
from benchmarks.workloads import questions, turn

OURS, EACH, BARE = "roundhouse", "roundhouse-chunk-per-token", "bare-engine"
CONCURRENCY = (1, 8, 32)
BURSTS = {1: 4, 8: 2, 32: 1}
"""How often a round asks so many at once: few answers make a poor median."""
NEW_TOKENS = 64
BURST_S = 600.0
IDLE_REQUESTS = 200
IDLE_TOKENS = 2
IDLE_FROM = 2000
"""The idle server is asked questions that no round has asked."""
TARGETS = {
    "http_vs_bare_c32": Target(at_least=0.8),
    "http_vs_bare_c32_chunk_per_token": Target(at_least=0.7),
    "http_vs_ray_serve_llm_c32": Target(at_least=1.8),
    "http_vs_vllm_server_c8": Target(at_least=1.0),
    "http_vs_vllm_server_c32": Target(at_least=1.0),
    "http_vs_transformers_serve_c32": Target(at_least=5.0),
    "ttft_vs_ray_serve_llm_c1": Target(at_most=0.5),
    "ttft_vs_ray_serve_llm_c8": Target(at_most=0.5),
    "ttft_vs_ray_serve_llm_c32": Target(at_most=0.5),
    "ttft_vs_vllm_server_c1": Target(at_most=1.0),
    "ttft_vs_vllm_server_c8": Target(at_most=1.0),
    "ttft_vs_vllm_server_c32": Target(at_most=1.0),
    "ttft_added_ms_p50": Target(at_most=10.0),
    "ttft_added_ms_p99": Target(at_most=40.0),
}
Samples = dict[str, list[float]]


def main() -> int:
    """Measure each side, one after the other."""
    args = parse()
    end_properly()
    setup = Setup(args.model, args.threads, args.dtype)
    source, asked = questions()
    client = ClientLoad()
    samples: dict[str, Samples] = {}
    for name in args.sides:
        if why := unavailable(name):
            print(f"{name} is left out: {why}", file=sys.stderr, flush=True)
            continue
        print(f"starting {name}", file=sys.stderr, flush=True)
        if name == BARE:
            samples[name] = measure_bare(setup, asked, args)
            continue
        with SERVERS[name](setup) as running:
            samples[name] = {"ready_s": [running.ready_s]}
            samples[name] |= asyncio.run(measure(name, running, asked, args))
    config = {
        "model": model_label(args.model),
        "questions": source,
        "new_tokens": args.new_tokens,
        "concurrency": args.counts,
        "rounds": args.rounds,
        "dtype": args.dtype,
        "sampling": "greedy",
        "peers": VLLM.versions(),
    }
    warmth = "warm, one round before"
    return finish("serve_http", args, config, samples, ratios(samples), TARGETS, client, warmth)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments."""
    everyone = [BARE, *SERVERS]
    parser = arguments(__doc__ or "")
    parser.add_argument("--sides", type=names_of(everyone), default=everyone, metavar="A,B")
    parser.add_argument("--counts", type=numbers, default=list(CONCURRENCY), metavar="1,8,32")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument(
        "--idle", type=int, default=IDLE_REQUESTS, help="requests to an idle server"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args(argv)
    if not args.side:
        args.model = args.model or default_model()
        args.model = args.model.resolve()
    return args


def numbers(text: str) -> list[int]:
    """Read comma-separated positive numbers."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1")
    return found


def unavailable(name: str) -> str | None:
    """Say why a side cannot run here, if so."""
    return missing(VLLM) if name in ("vllm-server", "ray-serve-llm") else None


async def measure(
    name: str, running: Running, asked: Sequence[str], args: argparse.Namespace
) -> Samples:
    """Ask a server that has answered: one round to warm it, then the rounds that count."""
    samples: Samples = {}
    for number in range(-1, args.rounds):
        for count in args.counts:
            for again in range(BURSTS.get(count, 1)):
                batch = turn(asked, number * 10 + again + 10, count)
                used, client = running.cpu_s(), ClientLoad()
                told = await stream(running.endpoint, batch, args.new_tokens, count, BURST_S)
                share = client.share()
                if number < 0:
                    continue
                note(samples, count, told, args.new_tokens)
                samples.setdefault(f"client_cpu_share_c{count}", []).append(share)
                samples.setdefault(f"cpu_s_c{count}", []).append(running.cpu_s() - used)
                print(
                    f"round {number + 1} {name} c{count}: {told.tokens / told.seconds:.1f} "
                    f"tokens/s, {told.tokens} tokens",
                    file=sys.stderr,
                    flush=True,
                )
    if name == OURS and args.idle:
        idle = turn(asked, 0, IDLE_FROM + args.idle)[IDLE_FROM:]
        told = await stream(running.endpoint, idle, IDLE_TOKENS, 1, BURST_S)
        samples["idle_ttft_ms"] = [answer.first_s * 1000 for answer in told.answers]
    samples["rss_mib"] = [running.rss_mib()]
    return samples


def note(samples: Samples, count: int, told: Burst, asked_tokens: int) -> None:
    """Add what one burst gave: speed, times to the first text, gaps, and how many fell short."""
    short = sum(answer.tokens < asked_tokens for answer in told.answers)
    gaps = [gap * 1000 for answer in told.answers for gap in answer.gaps_s]
    samples.setdefault(f"tokens_per_s_c{count}", []).append(told.tokens / told.seconds)
    samples.setdefault(f"ttft_ms_c{count}", []).extend(a.first_s * 1000 for a in told.answers)
    samples.setdefault(f"gap_ms_c{count}", []).extend(round(gap, 3) for gap in gaps)
    samples.setdefault(f"tpot_ms_c{count}", []).extend(
        (a.total_s - a.first_s) * 1000 / (a.tokens - 1) for a in told.answers if a.tokens > 1
    )
    samples.setdefault(f"short_answers_c{count}", []).append(float(short))


def measure_bare(setup: Setup, asked: Sequence[str], args: argparse.Namespace) -> Samples:
    """Ask our engine itself the same, from a process beside it: no HTTP, no Ray."""
    from cluster.text.chat import ChatText

    text = ChatText.load(setup.model)

    def ids(question: str) -> list[int]:
        return list(text.encode_chat([{"role": "user", "content": question}]))

    argv = ["--model", str(setup.model), "--threads", str(setup.threads), "--dtype", setup.dtype]
    side = Side("benchmarks.serve", OURS, argv, setup.threads)
    samples: Samples = {"ready_s": [side.ready["first_token_s"]]}
    try:
        for number in range(-1, args.rounds):
            for count in args.counts:
                for again in range(BURSTS.get(count, 1)):
                    prompts = [ids(q) for q in turn(asked, number * 10 + again + 10, count)]
                    told = side.ask(prompts=prompts, answers=[args.new_tokens] * count)
                    if number < 0:
                        continue
                    speed = told["tokens"] / told["seconds"]
                    samples.setdefault(f"tokens_per_s_c{count}", []).append(speed)
                    samples.setdefault(f"ttft_ms_c{count}", []).extend(told["ttft_ms"])
                    line = f"round {number + 1} {BARE} c{count}: {speed:.1f} tokens/s"
                    print(line, file=sys.stderr, flush=True)
        for question in turn(asked, 0, IDLE_FROM + args.idle)[IDLE_FROM:]:
            told = side.ask(prompts=[ids(question)], answers=[IDLE_TOKENS])
            samples.setdefault("idle_ttft_ms", []).extend(told["ttft_ms"])
    finally:
        side.close()
    return samples


def ratios(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return everything that can be compared in what was measured."""
    found: dict[str, float] = {}
    mine = samples.get(OURS, {})
    for peer in samples:
        if OURS not in samples or peer in (OURS, EACH):
            continue
        short = "bare" if peer == BARE else peer.replace("-", "_")
        for figure in samples[peer].keys() & mine.keys():
            name, _, count = figure.rpartition("_")
            if name == "tokens_per_s":
                found[f"http_vs_{short}_{count}"] = median_ratio(samples, figure, OURS, peer)
            elif name == "ttft_ms":
                found[f"ttft_vs_{short}_{count}"] = median_ratio(samples, figure, OURS, peer)
    each, bare = samples.get(EACH, {}), samples.get(BARE, {})
    for figure in each.keys() & bare.keys():
        if figure.startswith("tokens_per_s_"):
            count = figure.rpartition("_")[2]
            ratio = median_ratio(samples, figure, EACH, BARE)
            found[f"http_vs_bare_{count}_chunk_per_token"] = ratio
    if "idle_ttft_ms" in mine and "idle_ttft_ms" in bare:
        over, alone = (distribution(side["idle_ttft_ms"]) for side in (mine, bare))
        for p in ("p50", "p99"):
            found[f"ttft_added_ms_{p}"] = over[p] - alone[p]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    sys.exit(main())
