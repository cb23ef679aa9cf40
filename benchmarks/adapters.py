"""Eight adapters in one batch, beside the base alone and beside swapping one adapter for another.

One engine (one rank, a plain process) with SmolLM2 and eight LoRA adapters of it: rank 16, every
linear layer inside the blocks, float32, random numbers. 32 requests at once, each with a prompt of
its own, greedy, 64 new tokens each (nobody stops early). Without the prefix cache: no way of
answering finds what another has computed.

base              all 32 ask the base
adapters8         request i asks adapter i modulo 8, all in the same batches
swapping          the same requests, answered as a server does that holds one adapter at a time:
                  in order of arrival, the adapter released and the next one read between them
swapping-grouped  the same, but those of one adapter are answered together: eight swaps in all.
                  A kinder peer than most servers are, told beside and no target

    python -m benchmarks.adapters --json benchmarks/results/adapters-....json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    ClientLoad,
    Target,
    arguments,
    default_model,
    end_properly,
    finish,
    median_ratio,
    model_label,
)
from benchmarks.workloads import demo_questions, turn

BASE, MIXED, SWAPPING, GROUPED = "base", "adapters8", "swapping", "swapping-grouped"
ADAPTERS, COUNT, NEW_TOKENS, RANK = 8, 32, 64, 16
SPEED = f"tokens_per_s_c{COUNT}"
TARGETS = {
    "adapters8_vs_base_c32": Target(at_least=0.7),
    "vs_swapping_c32": Target(at_least=3.0),
}
VERSION = "m@1"
Prompts = Sequence[Sequence[int]]
Samples = dict[str, dict[str, list[float]]]


def write_adapter(base: Path, directory: Path, seed: int) -> Path:
    """Write a random adapter of every linear layer inside the blocks, as peft stores it."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    made, tensors = torch.Generator().manual_seed(seed), {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a mapping)
                if not name.endswith("_proj.weight"):
                    continue
                outputs, inputs = stored.get_slice(name).get_shape()
                layer = f"base_model.model.{name.removesuffix('.weight')}"
                down = torch.randn(RANK, inputs, generator=made) * inputs**-0.5
                up = torch.randn(outputs, RANK, generator=made) * 0.01
                tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(told))
    return directory


class Bench:
    """An engine with the base in it, and the ways to answer 32 requests."""

    def __init__(self, engine: Any, adapters: Sequence[Path], samples: Samples) -> None:
        self._engine, self._samples = engine, samples
        self._adapters = {f"a{n}@1": path for n, path in enumerate(adapters)}
        self._held: list[str] = []
        self._asked = 0
        self.ways: dict[str, Callable[[Prompts], Awaitable[int]]] = {
            BASE: self._base,
            MIXED: self._mixed,
            SWAPPING: self._swapping,
            GROUPED: self._grouped,
        }

    async def hold(self, names: Sequence[str]) -> None:
        """Have these adapters in memory, and no others."""
        for name in [name for name in self._held if name not in names]:
            await self._engine.release_adapter(name, 0.0)
            self._held.remove(name)
        for name in [name for name in names if name not in self._held]:
            began = time.monotonic()
            await self._engine.load_adapter(name, VERSION, str(self._adapters[name]))
            self._samples.setdefault(MIXED, {}).setdefault("load_ms", []).append(
                (time.monotonic() - began) * 1000
            )
            self._held.append(name)

    async def measure(self, way: str, prompts: Prompts) -> float:
        """Return tokens a second of one way to answer ``prompts``."""
        # One that holds one adapter at a time begins with none; swaps count, the first as well
        await self.hold([*self._adapters] if way in (BASE, MIXED) else [])
        began = time.monotonic()
        tokens = await self.ways[way](prompts)
        return tokens / (time.monotonic() - began)

    async def _base(self, prompts: Prompts) -> int:
        return sum(await asyncio.gather(*(self._one(ids, VERSION) for ids in prompts)))

    async def _mixed(self, prompts: Prompts) -> int:
        asked = (self._one(ids, self._name(i)) for i, ids in enumerate(prompts))
        return sum(await asyncio.gather(*asked))

    async def _swapping(self, prompts: Prompts) -> int:
        tokens = 0
        for i, ids in enumerate(prompts):
            await self.hold([self._name(i)])
            tokens += await self._one(ids, self._name(i))
        return tokens

    async def _grouped(self, prompts: Prompts) -> int:
        tokens = 0
        for n in range(ADAPTERS):
            await self.hold([self._name(n)])
            group = (self._one(ids, self._name(n)) for ids in prompts[n::ADAPTERS])
            tokens += sum(await asyncio.gather(*group))
        return tokens

    def _name(self, request: int) -> str:
        return [*self._adapters][request % ADAPTERS]

    async def _one(self, ids: Sequence[int], version: str) -> int:
        from serve_apps.engine.interface import EngineRequest, Sampling

        self._asked += 1
        request = EngineRequest(
            f"r{self._asked}", tuple(ids), NEW_TOKENS, Sampling(temperature=0.0)
        )
        count = 0
        async for chunk in self._engine.generate(request, version):
            count += len(chunk.token_ids)
        return count


async def run(args: argparse.Namespace, adapters: Sequence[Path]) -> Samples:
    """Measure all ways in alternating rounds; round -1 warms them and is not counted."""
    from cluster.text.chat import ChatText
    from serve_apps.config import Sharded
    from serve_apps.engine.sharded import ShardedEngine

    config = Sharded.model_validate(
        {
            "host": "process",
            "threads": args.threads,
            "max_model_len": 1024,
            "max_concurrent": COUNT,
            "max_queued": 0,
            "max_adapters": ADAPTERS,
            "prefix_cache": False,
        }
    )
    text, asked = ChatText.load(args.model), demo_questions()
    samples: Samples = {}
    engine = ShardedEngine(config)
    await engine.start()
    try:
        await engine.load(VERSION, str(args.model))
        await engine.activate(VERSION)
        bench = Bench(engine, adapters, samples)
        for number in range(-1, args.rounds):
            chats = turn(asked, number + 1, COUNT)
            prompts = [list(text.encode_chat([{"role": "user", "content": q}])) for q in chats]
            ways = [*bench.ways] if number >= 0 else [BASE, MIXED]
            for way in ways if number % 2 == 0 else reversed(ways):
                speed = await bench.measure(way, prompts)
                print(f"round {number + 1} {way}: {speed:.1f} tokens/s", file=sys.stderr)
                if number >= 0:
                    samples.setdefault(way, {}).setdefault(SPEED, []).append(speed)
    finally:
        await engine.stop()
    return samples


def main() -> int:
    """Measure, and write the result."""
    args = arguments(__doc__ or "").parse_args()
    args.model = args.model or default_model()
    end_properly()
    client = ClientLoad()
    with tempfile.TemporaryDirectory(prefix="rh-adapters-") as place:
        adapters = [write_adapter(args.model, Path(place) / f"a{n}", n) for n in range(ADAPTERS)]
        samples = asyncio.run(run(args, adapters))
    ratios = {
        "adapters8_vs_base_c32": median_ratio(samples, SPEED, MIXED, BASE),
        "vs_swapping_c32": median_ratio(samples, SPEED, MIXED, SWAPPING),
        "vs_swapping_grouped_c32": median_ratio(samples, SPEED, MIXED, GROUPED),
    }
    config = {
        "model": model_label(args.model),
        "adapters": ADAPTERS,
        "rank": RANK,
        "targets": "all linear layers inside the blocks",
        "requests": COUNT,
        "new_tokens": NEW_TOKENS,
        "rounds": args.rounds,
        "sampling": "greedy",
        "prefix_cache": False,
    }
    warmth = "warm, one round before"
    return finish("adapters", args, config, samples, ratios, TARGETS, client, warmth)


if __name__ == "__main__":
    sys.exit(main())
