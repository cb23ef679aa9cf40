"""A release from its first entry to its last, and what is left when its conductor is killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ReleaseError
from cluster.library import releases as records
from cluster.library.releases import Release
from cluster.library.store import Library
from serve_apps import release_control
from serve_apps.release_config import Golden, ReleasePolicy
from serve_apps.release_counts import Counts
from serve_apps.release_policy import Order, Report
from serve_apps.releases import Releases
from tests.unit.serving_fixtures import publish, two_versions, until

pytestmark = pytest.mark.anyio
OLD, NEW = "tiny@1", "tiny@2"
STEPS = {"traffic": {"steps": [{"percent": p, "for_s": 0, "requests": 5} for p in (10, 100)]}}
GOLDEN = {"gates": {"golden": [{"chat": "capital?", "contains": "Paris"}]}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_control, "TURN_S", 0.002)
    monkeypatch.setattr(release_control, "LISTEN_S", 0.01)
    monkeypatch.setattr(release_control, "FRESH_S", 0.0)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return two_versions(tmp_path)


class Says:
    """Answers golden prompts."""

    def __init__(self, text: str = "Paris") -> None:
        self.text, self.asked = text, 0

    async def ask(self, name: str, version: str, golden: Golden) -> str:
        self.asked += 1
        assert version == NEW
        return self.text


class FakeReplica:
    """Follows orders at once; ``bad`` are versions that do not load."""

    def __init__(self, who: str, bad: Mapping[str, str] | None = None) -> None:
        self.who, self.bad = who, dict(bad or {})
        self.report = Report()
        self.most_held = 0

    async def follow(self, releases: Releases) -> None:
        order: Order | None = None
        while True:
            order = await releases.watch("tiny", "champion", self.who, self.report, order)
            wanted = {v for v in (order.active, order.also) if v}
            failed = {v: self.bad[v] for v in wanted if v in self.bad}
            held = tuple(sorted(wanted - set(failed)))
            active = order.active if order.active in held else self.report.active
            self.report = Report(
                active, tuple(sorted({*held, *([active] if active else [])})), failed
            )
            self.most_held = max(self.most_held, len(held))


@asynccontextmanager
async def cluster(
    library: Library, *replicas: FakeReplica, asker: Any = None, fed: Counts | None = None
) -> AsyncIterator[Releases]:
    """Run a Releases object, replicas that follow it, and gateways that count ``fed``."""
    releases = Releases(library, asker=asker)
    tasks = [asyncio.create_task(one.follow(releases)) for one in replicas]

    async def feed() -> None:
        while True:
            await asyncio.sleep(0.002)
            if canary := releases._conductor.canary("tiny"):
                theirs = Counts(requests=10 if canary.percent < 100 else 1)
                ours = fed if fed is not None else Counts(requests=2)
                await releases.count({canary.release: {NEW: ours, OLD: theirs}})

    tasks.append(asyncio.create_task(feed()))
    try:
        await until(lambda: all(r.report.active for r in replicas), "all answer")
        yield releases
    finally:
        for going in releases._conductor._going.values():
            if going.task:
                tasks.append(going.task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def policy(*parts: Mapping[str, Any]) -> ReleasePolicy:
    made: dict[str, Any] = {}
    for part in parts:
        made |= part
    return ReleasePolicy.model_validate(made)


def record(library: Library) -> Release:
    return records.of(library.root, "tiny")[-1]


def happened(library: Library) -> list[str]:
    return [entry.what for entry in record(library).entries if entry.what != "held"]


async def over(library: Library) -> Release:
    await until(lambda: record(library).over, "the release is over")
    return record(library)


async def test_RC05_a_better_one_is_promoted_by_itself(library: Library) -> None:
    replicas = FakeReplica("r0"), FakeReplica("r1")
    says = Says()
    async with cluster(library, *replicas, asker=says) as releases:
        await releases.start_release("tiny", 2, policy(STEPS, GOLDEN), "me")
        done = await over(library)
        assert happened(library) == ["started", "advanced", "advanced", "promoting", "promoted"]
        assert library.aliases("tiny") == {"champion": 2, "candidate": 2}
        await until(lambda: all(r.report == Report(NEW, (NEW,)) for r in replicas), "old is gone")
    assert says.asked >= 3, "before each step and before the end"
    last = library.alias_history("tiny")[-1]
    assert (last.alias, last.by) == ("champion", "release 1")
    end = next(entry for entry in done.entries if entry.what == "promoting")
    assert "requests, 0 failed" in end.why
    assert end.seen["champion"]["requests"] % 10 == 0, "of the last window that was its own"


async def test_RC05_golden_prompts_that_fail_end_it_before_anybody_is_answered(
    library: Library,
) -> None:
    replica = FakeReplica("r0")
    async with cluster(library, replica, asker=Says("Lyon")) as releases:
        await releases.start_release("tiny", 2, policy(STEPS, GOLDEN), "me")
        done = await over(library)
        assert happened(library) == ["started", "rolled_back"]
        assert "'capital?' was answered 'Lyon', without 'Paris'" in done.entries[-1].why
        await until(lambda: replica.report == Report(OLD, (OLD,)), "it is released")
    assert library.aliases("tiny")["champion"] == 1


async def test_RC06_errors_end_it_within_a_window(library: Library) -> None:
    async with cluster(library, FakeReplica("r0"), fed=Counts(requests=4, errors=2)) as releases:
        await releases.start_release("tiny", 2, policy(STEPS), "me")
        done = await over(library)
    assert happened(library) == ["started", "advanced", "rolled_back"]
    assert "requests failed, of the champion's 0 of" in done.entries[-1].why
    assert done.entries[-1].seen["candidate"]["errors"] >= 2
    assert library.aliases("tiny")["champion"] == 1


async def test_T31_a_candidate_that_does_not_load_changes_nothing(library: Library) -> None:
    good, bad = FakeReplica("r0"), FakeReplica("r1", {NEW: "no memory"})
    async with cluster(library, good, bad) as releases:
        await releases.start_release("tiny", 2, policy(STEPS), "me")
        done = await over(library)
        assert done.entries[-1].why == "replica r1 could not load tiny@2: no memory"
        await until(lambda: good.report == Report(OLD, (OLD,)), "the other one lets it go")
    assert happened(library) == ["started", "rolled_back"]


async def test_a_replica_that_falls_ill_while_the_candidate_answers_ends_it(
    library: Library,
) -> None:
    replica = FakeReplica("r0")
    async with cluster(library, replica, fed=Counts()) as releases:
        await releases.start_release("tiny", 2, policy(STEPS), "me")
        await until(lambda: "advanced" in happened(library), "it answers")
        await releases.report("tiny", "champion", "r0", Report())
        done = await over(library)
    assert done.entries[-1].why == "replica r0 stopped answering while tiny@2 answered 10 %"


async def test_one_loads_after_the_other(library: Library) -> None:
    replicas = [FakeReplica(f"r{n}") for n in range(3)]
    seen: list[int] = []
    async with cluster(library, *replicas) as releases:
        stage = releases.changed

        def changed() -> None:
            allowed = releases._conductor._going["tiny"].allowed
            held = {r.who for r in replicas if NEW in r.report.held}
            seen.append(len(allowed - held))
            stage()

        releases.changed = changed  # type: ignore[method-assign]
        await releases.start_release("tiny", 2, policy(STEPS, {"pace": "one"}), "me")
        await over(library)
    assert max(seen) == 1


async def test_who_stops_it_and_what_cannot_be_done_meanwhile(library: Library) -> None:
    async with cluster(library, FakeReplica("r0"), fed=Counts()) as releases:
        for refused in (releases.stop_release, releases.approve_release):
            with pytest.raises(ReleaseError, match="no release of tiny runs"):
                await refused("tiny", "me")
        with pytest.raises(ReleaseError, match="is tiny@champion already"):
            await releases.start_release("tiny", 1, policy(), "me")
        await releases.start_release("tiny", 2, policy(STEPS), "me")
        with pytest.raises(ReleaseError, match="a release of tiny@2 runs"):
            await releases.start_release("tiny", 2, policy(STEPS), "me")
        with pytest.raises(ReleaseError, match="release stop tiny"):
            await releases.promote("tiny", 2)
        await until(lambda: "advanced" in happened(library), "it answers")
        stopped = await releases.stop_release("tiny", "me")
        assert (stopped.over, stopped.entries[-1].why) == (True, "stopped by me")
        assert releases._conductor.canary("tiny") is None
        assert releases._order("tiny", "champion", "r0") == Order(OLD)


async def test_somebody_who_moves_the_alias_ends_it(library: Library) -> None:
    async with cluster(library, FakeReplica("r0"), fed=Counts()) as releases:
        await releases.start_release("tiny", 2, policy(STEPS), "me")
        await until(lambda: "advanced" in happened(library), "it answers")
        publish(library, library.root.parent, mark="c")
        library.move_alias("tiny", "champion", 3, 1, "somebody else")
        done = await over(library)
    assert done.entries[-1].why == "tiny@champion was moved to version 3 meanwhile"


async def test_a_successor_takes_the_candidate_from_nobody(library: Library) -> None:
    async with cluster(library, FakeReplica("r0"), fed=Counts()) as releases:
        await releases.start_release("tiny", 2, policy(STEPS), "me")
        await until(lambda: "advanced" in happened(library), "it answers")
    releases = Releases(library)
    both = Report(OLD, (OLD, NEW))
    assert await releases.watch("tiny", "champion", "r0", both, None) == Order(OLD, NEW)
    served = (await releases.snapshot()).served["tiny"]
    assert served.canary
    assert served.canary.percent == 10
    await releases.stop_release("tiny", "me")


async def test_a_policy_that_newer_code_cannot_read_ends_the_release(library: Library) -> None:
    records.begin(library.root, "tiny", "champion", 1, 2, {"gone": 1}, "me", "asked for")
    async with cluster(library, FakeReplica("r0")):
        done = await over(library)
    assert "its policy cannot be read" in done.entries[-1].why


class Killed(BaseException):
    """Ends a conductor where a signal would."""


def kill_at(monkeypatch: pytest.MonkeyPatch, nth: int, after: bool) -> Callable[[], bool]:
    """Have the nth write of the record, or of the alias, end whoever does it: before or after."""
    writes = 0
    real, real_move = records._write, Library.move_alias

    def write(root: Path, release: Release) -> None:
        once(lambda: real(root, release))

    def move(self: Library, *args: Any) -> None:
        once(lambda: real_move(self, *args))

    def once(act: Callable[[], None]) -> None:
        nonlocal writes
        writes += 1
        if writes == nth and not after:
            raise Killed
        act()
        if writes == nth:
            raise Killed

    monkeypatch.setattr(records, "_write", write)
    monkeypatch.setattr(Library, "move_alias", move)
    return lambda: writes >= nth


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("nth", range(2, 12))
@pytest.mark.parametrize("good", [True, False], ids=["good", "bad"])
async def test_RC06_a_conductor_killed_at_any_write_leaves_the_old_or_the_new(
    library: Library, monkeypatch: pytest.MonkeyPatch, nth: int, after: bool, good: bool
) -> None:
    replicas = [FakeReplica("r0"), FakeReplica("r1")]
    fed = Counts(requests=2, errors=0 if good else 2)
    async with cluster(library, *replicas, fed=fed) as releases:
        with monkeypatch.context() as patched:
            dead = kill_at(patched, nth, after)
            with suppress(Killed):
                await releases.start_release("tiny", 2, policy(STEPS), "me")
            found = records.of(library.root, "tiny")
            await until(lambda: dead() or (found and record(library).over), "killed, or done")
            await asyncio.sleep(0.01)
    whole = records.of(library.root, "tiny")
    now = library.aliases("tiny")["champion"]
    assert now in (1, 2)
    async with cluster(library, *[FakeReplica("s0"), FakeReplica("s1")], fed=fed) as releases:
        if not whole:
            assert now == 1, "nothing was written, nothing happened"
            return
        done = await over(library)
        wanted = "promoted" if good else "rolled_back"
        assert done.entries[-1].what == wanted
        assert library.aliases("tiny")["champion"] == (2 if good else 1)
        assert releases._conductor.canary("tiny") is None
