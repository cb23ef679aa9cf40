"""Personal data out of a record, before anything learns it. Labels and facts stay as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from cluster.text.pii import find, scrub
from train_jobs.data.records import Record, Tagged

KEPT = frozenset({"where", "label", "tags", "facts", "role", "tools", "type", "id", "tool_call_id"})

Kind = TypeVar("Kind", bound=Record)


def scrubbed(record: Kind) -> tuple[Kind, Counter[str]]:
    """Return a record with placeholders for personal data, and how many of each kind."""
    counts: Counter[str] = Counter()
    if isinstance(record, Tagged):
        return replace(record, words=_words(record.words, counts)), counts
    changed = {
        f.name: _scrub(getattr(record, f.name), counts)
        for f in fields(record)
        if f.name not in KEPT
    }
    return replace(record, **changed), counts


def _scrub(value: Any, counts: Counter[str]) -> Any:
    if isinstance(value, str):
        text, kinds = scrub(value)
        counts.update(kinds)
        return text
    if isinstance(value, Mapping):
        return {k: v if k in KEPT else _scrub(v, counts) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_scrub(one, counts) for one in value)
    return value


def _words(words: tuple[str, ...], counts: Counter[str]) -> tuple[str, ...]:
    """Replace each word that what was found touches: there stay as many words as tags."""
    found = find(" ".join(words))
    counts.update(one.kind for one in found)
    told, start = [], 0
    for word in words:
        end = start + len(word)
        hit = next((one for one in found if one.start < end and start < one.end), None)
        told.append(hit.placeholder if hit else word)
        start = end + 1
    return tuple(told)
