"""Running text for models that read in both directions: whole, or as pairs of sentences."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from train_jobs.data.example import Document, Example
from train_jobs.data.records import Text

_BETWEEN = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+|\n\s*\n")


def whole(record: Text, text: ChatText) -> Example:
    """Encode a text with the model's special tokens around it."""
    ids = text.encode(record.text)
    if not set(ids) - text.special_ids:
        raise ConfigError("text: empty; there is nothing to hide")
    return Example((Document(record.where, ids, (True,) * len(ids)),))


def sentences(record: Text, text: ChatText) -> Example:
    """Encode each sentence by itself, without special tokens: `paired` makes pairs of them."""
    parts = [text.encode(part, begin=False) for part in divided(record.text)]
    documents = tuple(Document(record.where, ids, (True,) * len(ids)) for ids in parts if ids)
    if not documents:
        raise ConfigError("text: empty; it has no sentence")
    return Example(documents)


def divided(text: str) -> list[str]:
    """Divide a text behind full stops, question and exclamation marks, and at empty lines."""
    found, start = [], 0
    for gap in _BETWEEN.finditer(text):
        end = gap.start() + len(gap[0].rstrip())
        found.append(text[start:end].strip())
        start = gap.end()
    return [part for part in (*found, text[start:].strip()) if part]


def paired(texts: Sequence[Example], text: ChatText, seed: int, max_len: int) -> list[Example]:
    """Return every two neighbouring sentences as a pair; the second of half of them is replaced.

    It then comes from another text, as in arXiv:1810.04805. The label says whether it is the true
    one. Which are replaced, and by what, depends on the seed and the pair's place alone. A pair of
    more than ``max_len`` tokens loses the ends of its longer sentence.

    Raises ConfigError for fewer than two texts, texts of one sentence each, or a model without
    ``cls_token`` and ``sep_token``.
    """
    begin, end = (text.named_ids.get(name) for name in ("cls_token", "sep_token"))
    if begin is None or end is None:
        raise ConfigError(
            "objective.next_sentence: this model names no cls_token and sep_token, which part the "
            "sentences; write next_sentence: false"
        )
    pairs = []
    for number, example in enumerate(texts):
        for at, (first, second) in enumerate(
            zip(example.documents, example.documents[1:], strict=False)
        ):
            rng = random.Random(f"{seed}/next/{number}/{at}")
            follows = rng.random() < 0.5 or len(texts) < 2
            if not follows:
                other = rng.randrange(len(texts) - 1)
                second = rng.choice(texts[other + (other >= number)].documents)
            left, right = _cut(first.ids, second.ids, max_len - 3)
            parts = ((begin, *left, end), (*right, end))
            documents = tuple(replace(first, ids=ids, trained=(True,) * len(ids)) for ids in parts)
            pairs.append(Example(documents, follows))
    if len(texts) < 2 or not pairs:
        raise ConfigError(
            "objective.next_sentence: pairs need two texts, one of them of two sentences; give "
            "longer texts, or write next_sentence: false"
        )
    return pairs


def _cut(
    first: tuple[int, ...], second: tuple[int, ...], room: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the beginnings of two sequences that fit into ``room`` tokens together."""
    half = room // 2
    if len(first) + len(second) <= room:
        return first, second
    if len(first) <= half:
        return first, second[: room - len(first)]
    if len(second) <= half:
        return first[: room - len(second)], second
    return first[: room - half], second[:half]
