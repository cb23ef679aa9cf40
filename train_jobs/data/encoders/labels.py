"""Texts and words with labels."""

from __future__ import annotations

import math
from collections.abc import Iterator

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from train_jobs.data.example import Document, Example
from train_jobs.data.records import Labelled, Tagged
from train_jobs.objectives.settings import SequenceClassification

PARTED = "\n\n"
"""Between two texts, for a model that has no separator of its own."""


def labelled(record: Labelled, text: ChatText, objective: SequenceClassification) -> Example:
    """Encode a text or a pair. A second document begins where the model's token types change.

    The label is a name, several names, or a number, as the problem asks.
    """
    first, second = record.text, record.other
    if second is not None and "sep_token" not in text.named_ids:
        first, second = f"{first}{PARTED}{second}", None
    encoding = text.encoding(first, second)
    if not encoding.ids:
        raise ConfigError("text: empty; there is nothing to judge")
    types = list(encoding.type_ids)
    cut = types.index(1) if second is not None and 1 in types else len(types)
    parts = [tuple(encoding.ids[:cut]), tuple(encoding.ids[cut:])]
    documents = tuple(Document(record.where, ids, (True,) * len(ids)) for ids in parts if ids)
    return Example(documents, _label(record.label, objective))


def _label(label: str | float | tuple[str, ...], objective: SequenceClassification) -> object:
    match objective.problem:
        case "regression":
            try:
                number = math.nan if isinstance(label, tuple) else float(label)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise ConfigError(f"label: a regression needs a number, not {label!r:.60}")
            return number
        case "multi_label":
            return tuple(sorted(set(label))) if isinstance(label, tuple) else (_name(label),)
        case "single_label":
            if isinstance(label, tuple):
                raise ConfigError(
                    f"label: {list(label)!r:.60} are several; write problem: multi_label, or give "
                    "each row one"
                )
            return _name(label)


def _name(label: str | float) -> str:
    """Return a label as text; a class that a file writes as the number 1.0 is ``1``."""
    if isinstance(label, str):
        return label
    return str(int(label)) if float(label).is_integer() else str(label)


def tagged(record: Tagged, text: ChatText) -> Example:
    """Encode words with a space between them; the first token of each word carries its tag.

    The label holds a tag for each token, None where there is none.
    """
    if not record.words or len(record.words) != len(record.tags):
        raise ConfigError(
            f"tags: {len(record.tags)} tags for {len(record.words)} words; give each word one"
        )
    encoding = text.encoding(" ".join(record.words))
    tags = tuple(
        None if word is None else record.tags[word]
        for word in first_tokens(record.words, encoding.offsets)
    )
    carries = tuple(tag is not None for tag in tags)
    if not any(carries):
        raise ConfigError("words: none of them has a token; there is nothing to tag")
    return Example((Document(record.where, tuple(encoding.ids), carries),), tags)


def first_tokens(words: tuple[str, ...], offsets: list[tuple[int, int]]) -> Iterator[int | None]:
    """Yield for each token the word that it is the first of, else None.

    ``offsets`` are characters of the words joined by single spaces; some tokenizers count the
    space before a word to its first token.
    """
    at = end = 0
    starts = []
    for word in words:
        starts.append((end, end + len(word)))
        end += len(word) + 1
    seen = -1
    for begin, stop in offsets:
        while at < len(words) and starts[at][1] <= begin:
            at += 1
        inside = at < len(words) and begin < stop and stop > starts[at][0]
        yield at if inside and at != seen else None
        if inside:
            seen = at
