"""Whether a release goes on: what was seen in, a decision and its reason out. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from serve_apps.release_config import Gates, ReleasePolicy, Step
from serve_apps.release_counts import Counts
from serve_apps.release_policy import Report

SURE = 1.645
"""Standard deviations: what is called slower is, of either version at one-sided 95 %."""
RARE = 0.05
"""Requests that fail are called too many when as many by chance alone would be as rare as that."""
FEW = 20
"""Of fewer times to a first token, or answers, no ratio is taken."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Stay; ``why`` is what has to come."""

    why: str


@dataclass(frozen=True, slots=True)
class Advance:
    """All that had to hold does."""

    why: str


@dataclass(frozen=True, slots=True)
class Rollback:
    """The champion keeps its place."""

    why: str


Decision = Hold | Advance | Rollback


@dataclass(frozen=True, slots=True)
class Judged:
    """One figure of both versions: what the intervals say."""

    verdict: str
    """``holds``, ``fails``, ``unclear`` or ``missing``."""
    told: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known at one moment of a step."""

    elapsed_s: float
    candidate: Counts = field(default_factory=Counts)
    champion: Counts = field(default_factory=Counts)
    """In the same window; where it answers nothing any more, in the last one where it did."""
    golden: Sequence[str] | None = None
    """What did not hold of the golden prompts; ``None``: they have not been asked in this step."""
    evaluations: Sequence[Judged] = ()
    approved: bool = False


def loaded(
    ref: str, replicas: Mapping[str, Report], known: Iterable[str], elapsed_s: float, bound_s: float
) -> Decision:
    """Decide while replicas load the candidate; ``known`` are those there have been."""
    if gone := lost(replicas, known):
        return Rollback(f"{gone} while {ref} was loaded")
    for who, report in sorted(replicas.items()):
        if ref in report.failed:
            return Rollback(f"replica {who} could not load {ref}: {report.failed[ref]}")
    there = sum(ref in report.held for report in replicas.values())
    if replicas and there == len(replicas):
        return Advance(f"{ref} is held by {there} of {len(replicas)} replicas")
    if elapsed_s > bound_s:
        return Rollback(
            f"{ref} is held by {there} of {len(replicas)} replicas after {bound_s:g} s "
            "(load_timeout_s)"
        )
    return Hold(f"loading {ref}: {there} of {len(replicas)} replicas")


def lost(replicas: Mapping[str, Report], known: Iterable[str]) -> str:
    """Say which replica died or fell ill; empty when none did."""
    for who in sorted(known):
        if who not in replicas:
            return f"replica {who} died"
        if replicas[who].active is None:
            return f"replica {who} stopped answering"
    return ""


def entered(policy: ReleasePolicy, seen: Seen) -> Decision:
    """Decide whether the first step may begin: before any user gets an answer."""
    decision = _before(policy.gates, seen) or Advance(_passed(policy.gates))
    if isinstance(decision, Hold) and seen.elapsed_s > policy.hold_s:
        return Rollback(f"{decision.why}, still so after {policy.hold_s:g} s (hold_s)")
    return decision


def stepped(policy: ReleasePolicy, step: Step, seen: Seen) -> Decision:
    """Decide during a step: back at once when something is wrong, on when all is seen."""
    gates = policy.gates
    if wrong := next(_wrong(gates, seen), None):
        return Rollback(wrong)
    missing = [*_missing(policy, step, seen)]
    if missing:
        if seen.elapsed_s > policy.hold_s:
            return Rollback(f"{missing[0]}, still so after {policy.hold_s:g} s (hold_s)")
        return Hold("; ".join(missing))
    return _before(gates, seen) or Advance(_told(seen))


def _before(gates: Gates, seen: Seen) -> Decision | None:
    if seen.golden:
        return Rollback(f"golden prompts: {'; '.join(seen.golden)}")
    for judged in seen.evaluations:
        if judged.verdict == "fails":
            return Rollback(judged.told)
    unclear = [j.told for j in seen.evaluations if j.verdict != "holds"]
    if unclear and not seen.approved:
        return Hold(f"{'; '.join(unclear)}; `roundhouse release approve` lets it pass")
    if gates.golden and seen.golden is None:
        return Hold("the golden prompts are being asked")
    return None


def _wrong(gates: Gates, seen: Seen) -> Iterator[str]:
    """Yield what is clearly not as it must be."""
    if seen.golden:
        yield f"golden prompts: {'; '.join(seen.golden)}"
    ours, theirs = seen.candidate, seen.champion
    if gates.errors:
        most = theirs.error_rate + gates.errors.above_champion
        if _by_chance(ours.errors, ours.requests, most) < RARE:
            yield (
                f"{ours.errors} of {ours.requests} requests failed, of the champion's "
                f"{theirs.errors} of {theirs.requests}"
            )
    yield from _slow(gates, seen, SURE)
    same = gates.shadow
    if same and ours.compared >= same.compared and ours.matched < same.match * ours.compared:
        yield (
            f"in the shadow {ours.matched} of {ours.compared} answers were the champion's, less "
            f"than {same.match:.0%}"
        )


def _missing(policy: ReleasePolicy, step: Step, seen: Seen) -> Iterator[str]:
    """Yield what has to be seen before the step may end."""
    if step.percent and seen.candidate.requests < step.requests:
        yield f"{seen.candidate.requests} of {step.requests} requests"
    if seen.elapsed_s < step.for_s:
        yield f"{seen.elapsed_s:.0f} of {step.for_s:g} s"
    same, gates = policy.gates.shadow, policy.gates
    if same and step.percent < 100 and seen.candidate.compared < same.compared:
        yield f"{seen.candidate.compared} of {same.compared} answers compared in the shadow"
    if gates.errors and step.percent:
        most = seen.champion.error_rate + gates.errors.above_champion
        if seen.candidate.error_rate > most:
            yield (
                f"{seen.candidate.errors} of {seen.candidate.requests} requests failed: too many, "
                "or too few to tell"
            )
    for slow in _slow(gates, seen, 0.0):
        yield f"{slow}, or too few to tell"


def _slow(gates: Gates, seen: Seen, deviations: float) -> Iterator[str]:
    """Yield what takes too long, by so many standard deviations of both versions' times."""
    ours, theirs = seen.candidate, seen.champion
    late, slow = gates.ttft_p95, gates.tokens_per_s
    if late and min(ours.first.total(), theirs.first.total()) >= FEW:
        first, before = ours.waited(-deviations) or 0.0, theirs.waited(deviations) or 0.0
        if first > max(before * late.ratio, late.least_s):
            yield (
                f"the first token took {ours.ttft_p95:.3f} s (95th percentile), the champion's "
                f"{theirs.ttft_p95:.3f} s: more than {late.ratio:g} times that"
            )
    if slow and min(ours.per_token.total(), theirs.per_token.total()) >= FEW:
        rate, least = ours.pace(-deviations) or 0.0, theirs.pace(deviations) or 0.0
        if rate < least * slow.ratio:
            yield (
                f"{ours.tokens_per_s:.1f} tokens a second (median answer), the champion "
                f"{theirs.tokens_per_s:.1f}: less than {slow.ratio:g} of that"
            )


def _by_chance(bad: int, of: int, share: float) -> float:
    """Return how likely so many or more of so many fail, when each does by ``share``.

    The exact binomial tail. Where no more fail than ``share`` says it is not worked out: 1.
    """
    if bad <= share * of:
        return 1.0
    if not share:
        return 0.0
    fewer = (
        math.exp(
            math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1)
            + k * math.log(share) + (of - k) * math.log1p(-share)
        )
        for k in range(bad)
    )  # fmt: skip
    return max(1.0 - math.fsum(fewer), 0.0)


def _passed(gates: Gates) -> str:
    said = []
    if gates.golden:
        said.append(f"{len(gates.golden)} golden prompts hold")
    if gates.evaluations:
        said.append(f"{', '.join(one.figure for one in gates.evaluations)} as demanded")
    return "; ".join(said) or "nothing had to hold before"


def _told(seen: Seen) -> str:
    ours, theirs = seen.candidate, seen.champion
    said = [f"{ours.requests} requests, {ours.errors} failed"] if ours.requests else []
    if ours.ttft_p95 is not None and theirs.ttft_p95 is not None:
        said.append(f"first token {ours.ttft_p95:.3f} s (champion {theirs.ttft_p95:.3f} s)")
    if ours.tokens_per_s and theirs.tokens_per_s:
        said.append(f"{ours.tokens_per_s:.1f} tokens/s (champion {theirs.tokens_per_s:.1f})")
    if ours.shadows:
        said.append(
            f"{ours.shadows} shadows in {ours.shadow_s / ours.shadows:.2f} s each (champion "
            f"{ours.shadowed_s / ours.shadows:.2f} s), {ours.matched} of {ours.compared} the same"
        )
    return "; ".join(said) or "its time is over"
