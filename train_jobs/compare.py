"""Whether two versions really differ: a paired bootstrap over the examples both were asked. Pure.

What is compared are stored outcomes, so that a comparison needs no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError
from cluster.library.evaluations import HIGHER_IS_BETTER, LOWER_IS_BETTER, Evaluation
from train_jobs.metrics.bootstrap import Difference, Score, differences
from train_jobs.outcome import Outcome


@dataclass(frozen=True)
class Compared:
    """One figure of both versions."""

    name: str
    first: float
    second: float
    difference: Difference
    """Of the second minus the first."""

    @property
    def verdict(self) -> str:
        """What the difference means."""
        if not self.difference.real:
            return "no difference shown"
        up = self.difference.value > 0
        if self.name in LOWER_IS_BETTER | HIGHER_IS_BETTER:
            return "better" if up == (self.name in HIGHER_IS_BETTER) else "worse"
        return "higher" if up else "lower"

    def as_json(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        told = self.difference
        return {
            "figure": self.name,
            "first": self.first,
            "second": self.second,
            "difference": told.value,
            "low": told.low,
            "high": told.high,
            "p": told.p,
            "real": told.real,
            "verdict": self.verdict,
        }


def compare(
    first: Sequence[Outcome],
    second: Sequence[Outcome],
    score: Score[Outcome],
    draws: int = 1000,
    seed: int = 0,
) -> list[Compared]:
    """Return every figure with its difference, the second minus the first."""
    ours, theirs = score(second), score(first)
    found = differences(second, first, score, draws, seed=seed)
    return [
        Compared(name, theirs[name], ours[name], told)
        for name, told in found.items()
        if name in ours and name in theirs
    ]


def paired(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> tuple[list[Outcome], list[Outcome]]:
    """Return both versions' outcomes in one order: by their place in the data.

    Raises:
        ConfigError: they are not of the same examples.
    """
    sides = [_by_place(first), _by_place(second)]
    if sides[0].keys() != sides[1].keys():
        odd = sorted(sides[0].keys() ^ sides[1].keys())[0]
        raise ConfigError(
            f"the two were not measured on the same examples: only one of them has {odd[0]}; "
            "evaluate both again with --again and the same --set data.max_len"
        )
    places = list(sides[0])
    return [sides[0][place] for place in places], [sides[1][place] for place in places]


def check_comparable(first: Evaluation, second: Evaluation) -> None:
    """Refuse two evaluations that did not ask the same."""
    if first.objective != second.objective:
        raise ConfigError(
            f"{first.ref} was measured as {first.objective}, {second.ref} as {second.objective}; "
            "name what both can do with --objective"
        )
    for name in ("data", "dtype", "seed"):
        mine, theirs = first.settings.get(name), second.settings.get(name)
        if mine != theirs:
            raise ConfigError(
                f"{first.ref} was measured with {name}={mine}, {second.ref} with {theirs}; "
                "evaluate both again with --again"
            )


def tokens_differ(first: Sequence[Outcome], second: Sequence[Outcome]) -> bool:
    """Say whether the two were asked about other tokens: then a loss a token compares nothing."""
    return any(a.weight != b.weight for a, b in zip(first, second, strict=True))


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """Return a stored outcome; lists become tuples again, which figures count."""
    said, meant = _frozen(row["said"]), _frozen(row["meant"])
    return Outcome(row["where"], row["loss"], row["weight"], said, meant)


def _by_place(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Outcome]:
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        found[row["where"], seen[row["where"]]] = outcome_of(row)
        seen[row["where"]] += 1
    return found


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
