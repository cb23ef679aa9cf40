"""Who answers while a release runs: shares, sides that stay, the way back, the shadow."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import RequestError
from serve_apps.calls import Call, Event, Refusal
from serve_apps.config import Limits
from serve_apps.engine.interface import Sampling
from serve_apps.gateway.traffic import SESSION, Choice, Traffic, side
from serve_apps.release_counts import Counts, from_json
from serve_apps.release_policy import Canary, Served
from tests.unit.serving_fixtures import AUTH, CHAT, stack, until

pytestmark = pytest.mark.anyio
OLD, NEW = "tiny@1", "tiny@2"
CANARY = Canary("tiny#1", NEW, OLD, percent=10.0, sticky="user")
SERVED = Served("tiny", "champion", (OLD,), (OLD, NEW), {"champion": 1}, canary=CANARY)
CALL = Call("c1", 8, False, ({"role": "user", "content": "Hi"},), sampling=Sampling(temperature=0))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Two:
    """Two versions; ``fails`` says what a version's answers end with, before or after a token."""

    def __init__(self, fails: Mapping[str, tuple[int, Refusal]] | None = None) -> None:
        self.fails, self.says = dict(fails or {}), {OLD: "ab", NEW: "ab"}
        self.calls: list[Call] = []
        self.gate: asyncio.Event | None = None

    def served(self) -> Mapping[str, Served]:
        return {"tiny": SERVED}

    def ready(self) -> bool:
        return True

    async def generate(self, name: str, call: Call) -> AsyncGenerator[Event | Refusal, None]:
        self.calls.append(call)
        version = call.version or OLD
        after, refusal = self.fails.get(version, (99, None))
        if self.gate and version == NEW:
            await self.gate.wait()
        for n, text in enumerate(self.says[version]):
            if n == after and refusal:
                yield refusal
                return
            last = n == len(self.says[version]) - 1
            yield Event(version, 0, text, 3 if n == 0 else 0, n + 1, "stop" if last else None)


async def said(traffic: Traffic, backend: Two, candidate: bool) -> tuple[set[str], str]:
    choice = Choice(CANARY, candidate)
    stream = traffic.events(backend, SERVED, CALL, Limits(), choice)
    events = [event async for event in stream]
    return {event.version for event in events}, "".join(event.text for event in events)


def test_RC05_a_share_of_the_people_is_the_share_of_the_requests() -> None:
    people = [f"user{n}" for n in range(4000)]
    over = [p for p in people if side(CANARY, p, random.random)]
    assert 323 <= len(over) <= 477, "binomial(4000, 0.1) but for once in 20,000 times"
    more = replace(CANARY, percent=25.0)
    assert set(over) < {p for p in people if side(more, p, random.random)}, "none goes back"
    other = replace(CANARY, release="tiny#2")
    again = {p for p in people if side(other, p, random.random)}
    assert len(again & set(over)) < 100, "the next release tries others"
    for percent, expected in ((0.0, 0), (100.0, 4000)):
        whole = replace(CANARY, percent=percent)
        assert sum(side(whole, p, random.random) for p in people) == expected


def test_who_says_nothing_is_drawn() -> None:
    assert side(CANARY, "", lambda: 0.0999)
    assert not side(CANARY, "", lambda: 0.1001)
    assert not side(replace(CANARY, percent=0.0), "", lambda: 0.0)


@pytest.mark.parametrize(
    ("asked", "version", "concerned"),
    [("tiny", None, True), ("tiny@champion", None, False), ("tiny@1", OLD, False)],
)
def test_who_names_a_version_or_the_champion_is_left_alone(
    asked: str, version: str | None, concerned: bool
) -> None:
    choice = Traffic().choose(SERVED, asked, version, {}, {}, "")
    assert (choice is not None) is concerned
    assert Traffic().choose(replace(SERVED, canary=None), asked, version, {}, {}, "") is None


def test_sides_stay_by_user_or_by_session_within_a_tenant() -> None:
    drawn = iter([0.0] * 1000)
    traffic = Traffic(draw=lambda: next(drawn))
    by_session = replace(SERVED, canary=replace(CANARY, percent=50.0, sticky="session"))

    def asks(served: Served, who: str, tenant: str = "") -> bool:
        given, headers = {"user": who}, {SESSION: who}
        choice = traffic.choose(served, "tiny", None, given, headers, tenant)
        assert choice
        return choice.candidate

    by_user = replace(SERVED, canary=replace(CANARY, percent=50.0))
    for served in (by_user, by_session):
        sides = {f"u{n}": {asks(served, f"u{n}") for _ in range(5)} for n in range(50)}
        assert all(len(side) == 1 for side in sides.values())
        assert {s for side in sides.values() for s in side} == {True, False}
    others = [asks(by_user, f"u{n}", "another tenant") for n in range(50)]
    assert others != [asks(by_user, f"u{n}") for n in range(50)]
    nobody = traffic.choose(by_session, "tiny", None, {"user": "x"}, {}, "")
    assert nobody == Choice(by_session.canary, True), "drawn"  # type: ignore[arg-type]


def test_a_conversation_stays_on_its_side_as_it_grows() -> None:
    served = replace(SERVED, canary=replace(CANARY, percent=50.0, sticky="conversation"))
    sides = []
    for n in range(40):
        messages: list[dict[str, str]] = [{"role": "system", "content": "Be kind."}]
        seen = set()
        for turn in range(4):
            messages.append({"role": "user", "content": f"question {n} {turn}"})
            choice = Traffic().choose(served, "tiny", None, {"messages": messages}, {}, "")
            assert choice
            seen.add(choice.candidate)
            messages.append({"role": "assistant", "content": "answer"})
        assert len(seen) == 1
        sides += seen
    assert 5 <= sum(sides) <= 35
    raw = Traffic(draw=lambda: 0.0).choose(served, "tiny", None, {"prompt": "a"}, {}, "")
    assert raw
    assert raw.candidate, "a text has no beginning: it is drawn"


async def test_what_is_answered_is_counted_on_its_side() -> None:
    times = iter(n / 10 for n in range(1000))
    traffic = Traffic(clock=lambda: next(times))
    assert await said(traffic, Two(), True) == ({NEW}, "ab")
    assert await said(traffic, Two(), False) == ({OLD}, "ab")
    counts = traffic.drain()["tiny#1"]
    for version in (OLD, NEW):
        one = counts[version]
        assert (one.requests, one.errors, one.per_token.total()) == (1, 0, 1)
        assert one.tokens_per_s == pytest.approx(10.0, rel=0.06)
        assert one.ttft_p95 == pytest.approx(0.1, rel=0.06)
    assert traffic.drain() == {}


NOT_LIVE = Refusal("not live", 404, "model_not_found")
CRASH = Refusal("the engine failed", 502, "engine_failed")
LATE = Refusal("no token", 503, "first_token_timeout")
FULL = Refusal("full", 429, "engine_full")
BAD = Refusal("too long", 400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("refusal", "errors", "missed"), [(NOT_LIVE, 0, 1), (CRASH, 1, 0)], ids=["not live", "crash"]
)
async def test_what_fails_before_its_first_token_is_answered_by_the_champion(
    refusal: Refusal, errors: int, missed: int
) -> None:
    traffic, backend = Traffic(), Two({NEW: (0, refusal)})
    assert await said(traffic, backend, True) == ({OLD}, "ab")
    counts = traffic.drain()["tiny#1"]
    assert (counts[NEW].errors, counts[NEW].requests, counts[NEW].missed) == (
        errors, errors, missed,
    )  # fmt: skip
    assert counts[OLD].requests == 1


class Late(Two):
    """The candidate's time-out comes after ``takes_s`` of its clock; the champion never answers."""

    def __init__(self, takes_s: float) -> None:
        super().__init__({NEW: (0, LATE)})
        self.takes_s, self.now_s = takes_s, 0.0

    async def generate(self, name: str, call: Call) -> AsyncGenerator[Event | Refusal, None]:
        if call.version != NEW:
            self.calls.append(call)
            await asyncio.Event().wait()
        self.now_s += self.takes_s
        async for event in super().generate(name, call):
            yield event


async def test_the_champion_gets_what_the_candidate_left_of_the_time() -> None:
    backend = Late(299.8)
    traffic = Traffic(clock=lambda: backend.now_s)
    with pytest.raises(RequestError) as told:
        async with asyncio.timeout(30):
            await said(traffic, backend, True)
    assert told.value.code == "request_timeout"
    assert [call.version for call in backend.calls] == [NEW, None]
    assert backend.calls[1].deadline_s == pytest.approx(0.2), "nor does it begin later"


async def test_where_no_time_is_left_the_first_error_is_told_at_once() -> None:
    backend = Late(299.99)
    traffic = Traffic(clock=lambda: backend.now_s)
    with pytest.raises(RequestError) as told:
        await said(traffic, backend, True)
    assert (told.value.status, told.value.code) == (503, "first_token_timeout")
    assert len(backend.calls) == 1


async def test_the_second_try_has_an_id_of_its_own_towards_the_engine_alone() -> None:
    backend = Two({NEW: (0, CRASH)})
    await said(Traffic(), backend, True)
    assert [call.request_id for call in backend.calls] == ["c1", "c1-champion"]
    async with stack() as gate:
        canary = replace(CANARY, percent=100.0)
        gate.backend._served = {"tiny": replace(SERVED, canary=canary)}
        answer = await gate.chat("Hi", user="me")
        assert answer.headers["x-roundhouse-model"] == OLD
        assert "-champion" not in f"{answer.text} {answer.headers}"


async def test_after_a_token_there_is_no_way_back() -> None:
    traffic = Traffic()
    with pytest.raises(RequestError, match="engine failed"):
        await said(traffic, Two({NEW: (1, CRASH)}), True)
    assert traffic.drain()["tiny#1"][NEW].errors == 1


@pytest.mark.parametrize("refusal", [FULL, BAD], ids=["full", "bad"])
async def test_what_is_not_the_candidates_fault_is_told_as_it_is(refusal: Refusal) -> None:
    traffic, backend = Traffic(), Two({NEW: (0, refusal)})
    with pytest.raises(RequestError, match=refusal.message):
        await said(traffic, backend, True)
    assert len(backend.calls) == 1
    assert all(c.errors == 0 for c in traffic.drain().get("tiny#1", {}).values())


async def shadowed(traffic: Traffic, backend: Two, **canary: Any) -> list[Event]:
    canary = replace(CANARY, percent=0.0, shadow_percent=100.0, **canary)
    stream = traffic.events(backend, SERVED, CALL, Limits(), Choice(canary, False))
    return [event async for event in stream]


async def test_a_shadow_is_compared_and_never_sent() -> None:
    traffic, backend = Traffic(), Two()
    for text in ("ab", "ax"):
        backend.says[NEW] = text
        events = await shadowed(traffic, backend)
        assert {event.version for event in events} == {OLD}
        await until(lambda: not traffic._shadows, "its shadow ends")
    counts = traffic.drain()["tiny#1"][NEW]
    assert (counts.shadows, counts.compared, counts.matched, counts.requests) == (2, 2, 1, 0)
    shadow = next(call for call in backend.calls if call.version == NEW)
    assert (shadow.priority, shadow.request_id) == (1000, "c1-shadow")


async def test_shadows_are_bounded_and_wait_for_nobody() -> None:
    traffic, backend = Traffic(), Two()
    backend.gate = asyncio.Event()
    for _ in range(5):
        assert await shadowed(traffic, backend, shadow_concurrent=2)
    assert len(traffic._shadows) == 2
    assert sum(call.version == NEW for call in backend.calls) <= 2
    backend.gate.set()
    await until(lambda: not traffic._shadows, "they end")


async def test_a_shadow_that_fails_harms_nobody_and_is_counted() -> None:
    traffic, backend = Traffic(), Two({NEW: (0, CRASH)})
    assert await shadowed(traffic, backend)
    await until(lambda: not traffic._shadows, "it ends")
    counts = traffic.drain()["tiny#1"]
    assert (counts[NEW].shadow_errors, counts[NEW].errors, counts[OLD].requests) == (1, 0, 1)


async def test_through_the_door_a_version_that_is_not_live_costs_nobody_an_answer() -> None:
    async with stack() as gate:
        canary = replace(CANARY, percent=100.0)
        gate.backend._served = {"tiny": replace(SERVED, canary=canary)}
        for stream in (False, True):
            answer = await gate.chat("Hi", stream=stream, user="me")
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-roundhouse-model"] == OLD
        body = {"model": "tiny@2", "messages": [{"role": "user", "content": "Hi"}]}
        pinned = await gate.client.post(CHAT, json=body, headers=AUTH)
        assert pinned.status_code == 404, "who insists on it is told"


def test_counts_add_up_and_come_back_from_a_record() -> None:
    one, two = Counts(requests=3, errors=1), Counts(requests=1)
    for seconds in (0.01, 0.02, 0.5):
        one.first_token(seconds)
    for some in (one, two):
        some.answered(10, 2.0)
        some.answered(0, 0.0)
    one.add(two)
    again = from_json(one.as_json())
    assert (again.requests, again.errors, again.error_rate) == (4, 1, 0.25)
    assert (again.first, again.per_token) == (one.first, one.per_token)
    assert again.per_token.total() == 2, "an answer of one token has no rate"
    assert again.tokens_per_s == pytest.approx(5.0, rel=0.06)
    assert again.ttft_p95 == pytest.approx(0.5, rel=0.06)
    assert Counts().ttft_p95 is None
    slow = Counts()
    slow.first_token(1e9)
    assert slow.ttft_p95 is not None
