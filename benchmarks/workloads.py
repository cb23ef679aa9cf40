"""What the sides of a benchmark are asked: real text, fixed numbers, the same on every machine.

Prompts come from files that every clone has (the demo's data and the licence), or from GSM8K
where it lies beside the checkout. Each round asks something new, so that no side answers from its
prefix cache what it was asked before.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.env import ROOT

DEMO = ROOT / "train_jobs/data/demo"
LICENSE = ROOT / "LICENSE"
GSM8K = ROOT.parent / "shared/data/gsm8k/train.jsonl"
STRIDE = 67
"""Rounds begin this many questions apart; coprime to the length of the demo's data."""

MEDIAN_PROMPT, SPREAD_PROMPT = 90.0, 1.1
MEDIAN_ANSWER, SPREAD_ANSWER = 100.0, 0.9
SHORTEST, LONGEST_PROMPT, LONGEST_ANSWER = 4, 1024, 384

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Workload:
    """Requests that are sent at once."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]
    """How many tokens each one generates, exactly."""

    @property
    def longest(self) -> int:
        """Return the most tokens that one request holds, prompt and answer together."""
        return max(len(p) + n for p, n in zip(self.prompts, self.answers, strict=True))


def demo_questions() -> list[str]:
    """Return the demo data's questions."""
    return _first_turns(DEMO / "train.jsonl")


def questions(gsm8k: Path = GSM8K) -> tuple[str, list[str]]:
    """Return a name of the source and its questions: GSM8K where it is, else the demo's."""
    if not gsm8k.is_file():
        return "demo", demo_questions()
    rows = (json.loads(line) for line in gsm8k.read_text().splitlines())
    return "gsm8k", [row["question"] for row in rows]


def turn(of: Sequence[str], number: int, count: int, stride: int = STRIDE) -> list[str]:
    """Return ``count`` questions for round ``number``; neighbouring rounds ask others."""
    return [of[(number * stride + i) % len(of)] for i in range(count)]


def fixed(prompts: Sequence[Sequence[int]], answer: int) -> Workload:
    """Return prompts as they are, each answered by ``answer`` tokens."""
    return Workload(f"c{len(prompts)}", tuple(map(tuple, prompts)), (answer,) * len(prompts))


def lengths(count: int, seed: int) -> list[tuple[int, int]]:
    """Draw (prompt, answer) lengths in tokens as chats have them: many short, a few long.

    Lognormal with a fixed generator, cut at both ends. The shape is that of shared
    conversations; the scale is smaller, so that two cores finish in a minute.
    """
    draw = random.Random(seed)

    def one(median: float, spread: float, longest: int) -> int:
        value = round(draw.lognormvariate(math.log(median), spread))
        return min(max(value, SHORTEST), longest)

    return [
        (
            one(MEDIAN_PROMPT, SPREAD_PROMPT, LONGEST_PROMPT),
            one(MEDIAN_ANSWER, SPREAD_ANSWER, LONGEST_ANSWER),
        )
        for _ in range(count)
    ]


def corpus(encode: Encode) -> list[int]:
    """Return the tokens of all running text that every clone has, some twenty thousand."""
    texts = [LICENSE.read_text()]
    for name in ("train.jsonl", "heldout.jsonl"):
        for line in (DEMO / name).read_text().splitlines():
            texts.extend(message["content"] for message in json.loads(line)["messages"])
    return encode("\n".join(texts))


def mix(tokens: Sequence[int], count: int, seed: int) -> Workload:
    """Return chat-like lengths, the same for every ``seed``, over other stretches of text."""
    drawn = lengths(count, seed=0)
    prompts = stretches(tokens, [prompt for prompt, _ in drawn], seed)
    return Workload(f"mix_c{count}", prompts, tuple(answer for _, answer in drawn))


def long_context(
    tokens: Sequence[int], count: int, context: int, answer: int, seed: int
) -> Workload:
    """Return ``count`` requests of ``context`` prompt tokens each."""
    prompts = stretches(tokens, [context] * count, seed)
    return Workload(f"long_c{count}", prompts, (answer,) * count)


def stretches(
    tokens: Sequence[int], sizes: Sequence[int], seed: int
) -> tuple[tuple[int, ...], ...]:
    """Cut pieces of the given sizes; no two begin at the same place, so none shares a prefix."""
    draw = random.Random(seed)
    starts = draw.sample(range(len(tokens) - max(sizes)), len(sizes))
    return tuple(
        tuple(tokens[start : start + size]) for start, size in zip(starts, sizes, strict=True)
    )


def _first_turns(path: Path) -> list[str]:
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [row["messages"][0]["content"] for row in rows]
