"""What lets a release go on, what holds it and what ends it; and how two versions compare."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.library import evaluations
from cluster.library.evaluations import Evaluation, Figure
from cluster.library.store import Library
from serve_apps.release_config import Golden, Measured, ReleasePolicy
from serve_apps.release_counts import Counts
from serve_apps.release_evidence import judge, unmet
from serve_apps.release_gate import (
    Advance,
    Hold,
    Judged,
    Rollback,
    Seen,
    entered,
    loaded,
    stepped,
)
from serve_apps.release_policy import Report
from tests.unit.serving_fixtures import publish

OLD, NEW = "tiny@1", "tiny@2"
POLICY = ReleasePolicy()
STEP = POLICY.traffic.steps[0]


def counts(requests: int, errors: int = 0, ttft: float = 0.1, rate: float = 20.0) -> Counts:
    made = Counts(requests=requests, errors=errors)
    for _ in range(requests):
        made.first_token(ttft)
        made.answered(10, 10 / rate)
    return made


def seen(ours: Counts, theirs: Counts | None = None, **more: Any) -> Seen:
    return Seen(**{"elapsed_s": 301.0, "candidate": ours, "champion": theirs or counts(500)} | more)


def test_all_replicas_hold_it_or_it_ends() -> None:
    both = {"a": Report(OLD, (OLD, NEW)), "b": Report(OLD, (OLD, NEW))}
    assert isinstance(loaded(NEW, both, both, 0, 9), Advance)
    one = both | {"b": Report(OLD, (OLD,))}
    assert loaded(NEW, one, one, 0, 9) == Hold("loading tiny@2: 1 of 2 replicas")
    assert isinstance(loaded(NEW, one, one, 10, 9), Rollback)
    assert isinstance(loaded(NEW, {}, (), 0, 9), Hold)
    for replicas, why in (
        (one | {"b": Report(OLD, (OLD,), {NEW: "no"})}, "b could not load tiny@2: no"),
        ({"a": one["a"]}, "replica b died while"),
        (one | {"b": Report()}, "replica b stopped answering while"),
    ):
        decision = loaded(NEW, replicas, ["a", "b"], 0, 9)
        assert isinstance(decision, Rollback)
        assert why in decision.why


@pytest.mark.parametrize(
    ("ours", "kind", "why"),
    [
        (counts(99), Hold, "99 of 100 requests"),
        (counts(100), Advance, "100 requests, 0 failed"),
        (counts(100, errors=5), Rollback, "5 of 100 requests failed"),
        (counts(100, errors=2), Hold, "too few to tell"),
        (counts(8, errors=2), Rollback, "2 of 8 requests failed"),
        (counts(100, ttft=0.3), Rollback, "more than 1.5 times"),
        (counts(10, ttft=0.3), Hold, "10 of 100 requests"),
        (counts(6, errors=1), Hold, "6 of 100 requests"),
        (counts(5, errors=1), Rollback, "1 of 5 requests failed"),
        (counts(100, rate=10), Rollback, "less than 0.7 of that"),
        (counts(19, rate=10), Hold, "19 of 100 requests"),
        (counts(100, rate=16), Advance, "tokens/s (champion"),
    ],
)
def test_RC06_a_step_ends_well_waits_or_ends_it(ours: Counts, kind: type, why: str) -> None:
    decision = stepped(POLICY, STEP, seen(ours))
    assert isinstance(decision, kind), decision
    assert why in decision.why


def test_a_champion_that_fails_as_often_is_no_reason() -> None:
    decision = stepped(POLICY, STEP, seen(counts(100, 5), counts(500, 25)))
    assert isinstance(decision, Advance)


def test_fast_enough_is_fast_enough() -> None:
    decision = stepped(POLICY, STEP, seen(counts(100, ttft=0.04), counts(500, ttft=0.01)))
    assert isinstance(decision, Advance), "0.04 s is four times 0.01 s, and nobody waits"


def test_one_answer_that_stalls_ends_nothing_and_half_of_them_do() -> None:
    def some(slow: int) -> Counts:
        made = counts(100 - slow)
        made.add(counts(slow, rate=0.5))
        return made

    assert isinstance(stepped(POLICY, STEP, seen(some(5))), Advance)
    unclear = stepped(POLICY, STEP, seen(some(51)))
    assert isinstance(unclear, Hold)
    assert "too few to tell" in unclear.why
    ended = stepped(POLICY, STEP, seen(some(70)))
    assert isinstance(ended, Rollback)
    assert "0.5 tokens a second (median answer)" in ended.why


@pytest.mark.parametrize("share", [0.01, 0.06])
def test_requests_that_fail_as_they_may_end_few_releases(share: float) -> None:
    """At one look; what is allowed fails by chance alone, so up to 5 % is what RARE says."""
    policy = ReleasePolicy.model_validate({"gates": {"errors": {"above_champion": share}}})
    ended = 0.0
    for bad in range(41):
        ours = counts(40, errors=bad)
        if isinstance(stepped(policy, STEP, seen(ours)), Rollback):
            ended += math.comb(40, bad) * share**bad * (1 - share) ** (40 - bad)
    assert 0.0 < ended <= 0.05


def test_a_step_lasts_and_does_not_last_for_ever() -> None:
    early = stepped(POLICY, STEP, seen(counts(100), elapsed_s=10.0))
    assert early == Hold("10 of 300 s")
    late = stepped(POLICY, STEP, seen(counts(3), elapsed_s=90_000.0))
    assert isinstance(late, Rollback)
    assert "3 of 100 requests, still so after 86400 s" in late.why


def test_golden_prompts_and_evaluations_hold_or_end_it() -> None:
    golden = ReleasePolicy.model_validate({"gates": {"golden": [{"chat": "a", "equals": "b"}]}})
    nothing = Seen(0.0)
    assert isinstance(entered(POLICY, nothing), Advance)
    assert isinstance(entered(golden, nothing), Hold)
    assert isinstance(entered(golden, Seen(0.0, golden=[])), Advance)
    assert isinstance(entered(golden, Seen(0.0, golden=["wrong"])), Rollback)
    for verdict, kind, approved in (
        ("holds", Advance, Advance),
        ("unclear", Hold, Advance),
        ("missing", Hold, Advance),
        ("fails", Rollback, Rollback),
    ):
        judged = (Judged(verdict, "loss"),)
        assert isinstance(entered(POLICY, Seen(0.0, evaluations=judged)), kind)
        decision = entered(POLICY, Seen(0.0, evaluations=judged, approved=True))
        assert isinstance(decision, approved)
    during = stepped(golden, STEP, seen(counts(5), golden=["wrong"]))
    assert during == Rollback("golden prompts: wrong")


def test_shadows_that_differ_end_it() -> None:
    same = {"gates": {"shadow": {"match": 0.9}}, "shadow": {"percent": 10}}
    policy = ReleasePolicy.model_validate(same)
    few = counts(100)
    assert "0 of 20 answers compared" in stepped(policy, STEP, seen(few)).why
    for matched, kind in ((18, Advance), (17, Rollback)):
        ours = counts(100)
        ours.compared, ours.matched = 20, matched
        assert isinstance(stepped(policy, STEP, seen(ours)), kind)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"traffic": {"steps": [25, 5]}}, "a share only grows"),
        ({"gates": {"golden": [{"chat": "a"}]}}, "contains, equals or regex"),
        ({"gates": {"golden": [{"chat": "a", "prompt": "b", "equals": "c"}]}}, "give chat"),
        ({"gates": {"golden": [{"chat": "a", "regex": "("}]}}, "no regular expression"),
        ({"gates": {"evaluations": [{"figure": "mystery"}]}}, "say its direction"),
        ({"gates": {"safety_block_rate": {"max": 0.1}}}, "nothing counts blocked answers yet"),
        ({"gates": {"shadow": {"match": 0.9}}}, "set shadow.percent"),
    ],
)
def test_policies_that_cannot_be_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ReleasePolicy.model_validate(given)


def test_a_number_is_a_step() -> None:
    policy = ReleasePolicy.model_validate({"traffic": {"steps": [1, {"percent": 50, "for_s": 5}]}})
    assert [(s.percent, s.for_s) for s in policy.traffic.steps] == [(1, 300.0), (50, 5.0)]


def test_what_a_golden_answer_must_hold() -> None:
    wanted = Golden(chat="q", equals=" Paris ", regex="^P")
    assert unmet(wanted, "Paris\n") == ""
    assert "not ' Paris '" in unmet(wanted, "Lyon")
    assert "without 'Paris'" in unmet(Golden(prompt="q", contains="Paris"), "Lyon")
    assert "does not match" in unmet(Golden(prompt="q", regex="^P"), "Lyon")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    made = Library(tmp_path / "library")
    publish(made, tmp_path, mark="a")
    publish(made, tmp_path, mark="b")
    return made


def evaluate(library: Library, number: int, shift: float, noise: float, rows: int = 200) -> None:
    """Store losses of as many examples: hard and easy ones, moved by ``shift``."""
    draws = random.Random(7), random.Random(number)
    hard = [draws[0].uniform(1, 5) for _ in range(rows)]
    losses = [h + shift + draws[1].gauss(0, noise) for h in hard]
    told = [
        {"where": f"a:{n}", "loss": loss, "weight": 1.0, "said": None, "meant": None}
        for n, loss in enumerate(losses)
    ]
    mean = sum(losses) / rows
    spread = {"loss": Figure(value=mean, low=mean - 0.16, high=mean + 0.16)}
    found = Evaluation(
        id="lm-1", ref=f"tiny@{number}", digest="d", created="2026-01-01T00:00:00",
        objective={"kind": "causal_lm"}, data={"a": "hash"}, examples=rows, kept=rows, draws=1000,
        figures=spread | {"bleu": Figure(value=mean, low=mean - 0.16, high=mean + 0.16)},
    )  # fmt: skip
    evaluations.write(library.root, "tiny", number, found, told)


@pytest.mark.parametrize(
    ("shift", "noise", "must", "verdict"),
    [
        (-0.1, 0.1, "better", "holds"),
        (0.1, 0.1, "not_worse", "fails"),
        (0.0, 0.1, "better", "unclear"),
        (0.0, 0.0, "not_worse", "holds"),
        (0.0, 0.0, "better", "unclear"),
    ],
)
def test_RC05_a_loss_is_compared_example_by_example(
    library: Library, shift: float, noise: float, must: Any, verdict: str
) -> None:
    evaluate(library, 1, 0.0, noise)
    evaluate(library, 2, shift, noise)
    one, two = library.get("tiny", 1), library.get("tiny", 2)
    judged = judge(library, one, two, Measured(figure="loss", must=must))
    assert judged.verdict == verdict, judged.told
    # what is no mean over examples is compared by its intervals, which need a larger difference
    apart = judge(library, one, two, Measured(figure="f1_macro", must=must))
    assert apart.verdict == "missing"


def test_intervals_apart_need_a_larger_difference(library: Library) -> None:
    evaluate(library, 1, 0.0, 0.01)
    evaluate(library, 2, -0.1, 0.01)
    one, two = library.get("tiny", 1), library.get("tiny", 2)
    rows = evaluations.folder(library.root, "tiny", 2) / "lm-1.jsonl"
    kept = rows.read_text()
    rows.write_text(kept.replace('"loss": ', '"loss": 1'))  # they no longer add up to the figure
    judged = judge(library, one, two, Measured(figure="loss", must="better"))
    assert judged.verdict == "unclear", judged.told
    rows.write_text(kept)
    assert judge(library, one, two, Measured(figure="loss", must="better")).verdict == "holds"


def test_without_an_evaluation_of_both_it_is_missing(library: Library) -> None:
    evaluate(library, 2, 0.0, 0.1)
    one, two = library.get("tiny", 1), library.get("tiny", 2)
    judged = judge(library, one, two, Measured(figure="loss"))
    assert judged.verdict == "missing"
    assert "roundhouse eval tiny@2" in judged.told
