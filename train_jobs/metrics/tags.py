"""Named entities out of a tag for each word: the F1 of CoNLL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from train_jobs.metrics.check import paired
from train_jobs.metrics.classes import harmonic

Entity = tuple[str, int, int]
"""Its kind, its first word, and the first word behind it."""


def are_chunks(labels: Iterable[str]) -> bool:
    """Say whether labels are begin, inside and outside (``B-``, ``I-``, ``O``) of something."""
    names = set(labels)
    return "O" in names and any(name.startswith(("B-", "I-")) for name in names)


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the entities of one sentence, as conlleval finds them.

    ``I-X`` behind anything but ``B-X`` or ``I-X`` begins an entity (Ramshaw and Marcus,
    cmp-lg/9505040; Tjong Kim Sang and De Meulder, cs/0306050).
    """
    found: set[Entity] = set()
    kind, start = "", 0
    for at, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        inside = mark in ("B", "I") and bool(name)
        if kind and (not inside or mark == "B" or name != kind):
            found.add((kind, start, at))
            kind = ""
        if inside and not kind:
            kind, start = name, at
    return found


def entity_f1(said: Sequence[Sequence[str]], meant: Sequence[Sequence[str]]) -> float:
    """Return the micro F1 over entities, 0 to 1: kind and both ends must be right."""
    paired(said, meant)
    hits = told = due = 0
    for ours, theirs in zip(said, meant, strict=True):
        mine, true = entities(ours), entities(theirs)
        hits, told, due = hits + len(mine & true), told + len(mine), due + len(true)
    return harmonic(hits, told, due)
