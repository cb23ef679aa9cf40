"""What is known of two versions before anybody is answered: evaluations and golden prompts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.library import evaluations
from cluster.library.evaluations import Evaluation, Figure
from cluster.library.reading import Reader, Version
from serve_apps.release_config import Golden, Measured
from serve_apps.release_gate import Judged

DRAWS = 2000
"""Resamples of a paired comparison."""
SEED = 0


def judge(library: Reader, champion: Version, candidate: Version, wanted: Measured) -> Judged:
    """Compare a figure of two versions by what the library has stored; no model is asked.

    Paired over the examples where a figure is a mean over them; otherwise from both intervals,
    which is the more careful of the two: it takes longer until a difference counts.
    """
    pair = _alike(library, champion, candidate, wanted.figure)
    if pair is None:
        return Judged(
            "missing",
            f"{wanted.figure}: no evaluation of {candidate.ref} that {champion.ref} has alike; "
            f"run `roundhouse eval {candidate.ref}` and `roundhouse eval {champion.ref}` on the "
            "same data",
        )
    before, after = pair
    difference = _paired(library, champion, candidate, pair, wanted) or _apart(
        before.figures[wanted.figure], after.figures[wanted.figure], wanted.level
    )
    return _verdict(wanted, before, after, *difference)


def unmet(wanted: Golden, text: str) -> str:
    """Say what does not hold of an answer; empty when all does."""
    asked = wanted.chat if wanted.chat is not None else wanted.prompt
    shown = f"{asked!r:.60} was answered {text!r:.80}"
    if wanted.equals is not None and text.strip() != wanted.equals.strip():
        return f"{shown}, not {wanted.equals!r:.60}"
    if wanted.contains is not None and wanted.contains not in text:
        return f"{shown}, without {wanted.contains!r:.60}"
    if wanted.regex is not None and not re.search(wanted.regex, text):
        return f"{shown}, which {wanted.regex!r:.60} does not match"
    return ""


def _alike(
    library: Reader, champion: Version, candidate: Version, figure: str
) -> tuple[Evaluation, Evaluation] | None:
    """Return the newest evaluations of both that asked the same."""
    ours = [one for one in library.evaluations(candidate) if figure in one.figures]
    theirs = [one for one in library.evaluations(champion) if figure in one.figures]
    for after in reversed(ours):
        for before in reversed(theirs):
            if _asked(before) == _asked(after) and before.examples == after.examples:
                return before, after
    return None


def _asked(one: Evaluation) -> tuple[Any, ...]:
    return one.objective, one.data, *(one.settings.get(name) for name in ("data", "dtype", "seed"))


def _verdict(
    wanted: Measured, before: Evaluation, after: Evaluation, low: float, high: float
) -> Judged:
    name = wanted.figure
    told = (
        f"{name} {after.figures[name].value:.4f} against the champion's "
        f"{before.figures[name].value:.4f} (difference {low:+.4f} to {high:+.4f} at "
        f"{wanted.level:.0%})"
    )
    # from here on more is better
    low, high = (-high, -low) if wanted.lower else (low, high)
    enough = low > 0 if wanted.must == "better" else low >= -wanted.margin
    if enough:
        return Judged("holds", told)
    least = 0.0 if wanted.must == "better" else -wanted.margin
    if high < least:
        return Judged("fails", f"{told}: worse")
    return Judged("unclear", f"{told}: not shown to be {wanted.must.replace('_', ' ')}")


def _paired(
    library: Reader,
    champion: Version,
    candidate: Version,
    pair: tuple[Evaluation, Evaluation],
    wanted: Measured,
) -> tuple[float, float] | None:
    """Return the interval of the difference by resampling examples (Koehn, W04-3250).

    ``None`` where the stored examples do not add up to the stored figures: then the figure is no
    mean over them.
    """
    sides = []
    for version, one in zip((champion, candidate), pair, strict=True):
        rows = evaluations.outcomes(library.root, version.name, version.number, one)
        scored = _scores(rows, one, wanted.figure)
        if scored is None:
            return None
        sides.append(scored)
    if sides[0].keys() != sides[1].keys():
        return None
    import numpy as np

    columns = np.array([[*sides[0][at], *sides[1][at]] for at in sides[0]], dtype=np.float64)
    generator, drawn = np.random.default_rng(SEED), []
    for _ in range(DRAWS):
        places = generator.integers(len(columns), size=len(columns))
        a, weight_a, b, weight_b = columns[places].sum(axis=0)
        if weight_a and weight_b:
            drawn.append(b / weight_b - a / weight_a)
    outside = (1 - wanted.level) / 2
    low, high = np.quantile(drawn, [outside, 1 - outside])
    return float(low), float(high)


def _scores(
    rows: Sequence[Mapping[str, Any]], one: Evaluation, figure: str
) -> dict[tuple[str, int], tuple[float, float]] | None:
    """Return (sum, weight) of each example by its place, if their mean is the stored figure."""
    if not rows or len(rows) != one.examples:
        return None
    for count in (_loss, _hit):
        scored, seen = {}, Counter[str]()
        for row in rows:
            scored[row["where"], seen[row["where"]]] = count(row)
            seen[row["where"]] += 1
        total, weight = (sum(column) for column in zip(*scored.values(), strict=True))
        if weight and math.isclose(total / weight, one.figures[figure].value, rel_tol=1e-6):
            return scored
    return None


def _loss(row: Mapping[str, Any]) -> tuple[float, float]:
    return float(row["loss"]), float(row["weight"])


def _hit(row: Mapping[str, Any]) -> tuple[float, float]:
    return float(row["said"] == row["meant"]), 1.0


def _apart(before: Figure, after: Figure, level: float) -> tuple[float, float]:
    """Return an interval of the difference of two figures as if they were independent."""
    from statistics import NormalDist

    wider = NormalDist().inv_cdf((1 + level) / 2) / NormalDist().inv_cdf(0.975)
    half = math.hypot(*(_half(one) for one in (before, after))) * wider
    middle = after.value - before.value
    return middle - half, middle + half


def _half(one: Figure) -> float:
    """Return half of a 95 % interval; without one nothing is known but the value."""
    if one.low is None or one.high is None:
        return math.inf
    return max(one.high - one.value, one.value - one.low)
