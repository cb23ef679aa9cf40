"""Random pairs, judged answers and dialogues for tiny models."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.parity.engine_fixtures import VOCAB
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.data.packing import pack

OPENING = tuple(range(5, 15))
"""What all conversations begin with, as a system message."""


def answer(where: str, prompt: Sequence[int], rng: random.Random) -> Document:
    """Return a prompt with a random answer of 1 to 14 tokens."""
    ids = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 15))]
    return Document(where, (*prompt, *ids), (False,) * len(prompt) + (True,) * len(ids))


def prompts(count: int, seed: int) -> list[tuple[str, tuple[int, ...], random.Random]]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        asked = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(2, 12)))
        made.append((f"toy.jsonl:{number + 1}", (*OPENING, *asked), rng))
    return made


def pairs(count: int, seed: int = 0) -> list[Example]:
    """Return pairs of answers."""
    return [Example((answer(w, p, r), answer(w, p, r))) for w, p, r in prompts(count, seed)]


def judged(count: int, seed: int = 0) -> list[Example]:
    """Return answers of which two thirds are wanted."""
    made = prompts(count, seed)
    return [Example((answer(w, p, r),), n % 3 > 0) for n, (w, p, r) in enumerate(made)]


def in_rows(examples: list[Example], max_len: int = 128) -> Dataset:
    """Pack examples as the data loader does."""
    rows = pack([example.tokens for example in examples], max_len)
    return Dataset(tuple(tuple(examples[n] for n in row) for row in rows), max_len, 0, "0" * 64)
