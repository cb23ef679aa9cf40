"""Which version answers: the pure decisions, and the actor's class on a fake clock."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.errors import ReleaseError, RequestError, UnknownModel
from cluster.library.store import Library
from serve_apps.release_policy import (
    LIVE_S,
    GiveUp,
    Go,
    Order,
    Report,
    Served,
    Snapshot,
    Wait,
    after_load,
    after_swap,
    resolve,
    served_id,
)
from serve_apps.releases import Releases
from tests.unit.serving_fixtures import publish, two_versions, until

pytestmark = pytest.mark.anyio
OLD, NEW = "tiny@1", "tiny@2"
ON_OLD, BOTH, ON_NEW = Report(OLD, (OLD,)), Report(OLD, (OLD, NEW)), Report(NEW, (OLD, NEW))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return two_versions(tmp_path)


def test_the_alias_moves_when_every_live_replica_holds_the_target() -> None:
    assert isinstance(after_load(NEW, {}), Wait)
    assert isinstance(after_load(NEW, {"a": BOTH, "b": ON_OLD}), Wait)
    assert isinstance(after_load(NEW, {"a": BOTH, "b": BOTH}), Go)
    failed = Report(OLD, (OLD,), {NEW: "no memory"})
    decision = after_load(NEW, {"a": BOTH, "b": failed})
    assert isinstance(decision, GiveUp)
    assert "b could not load tiny@2: no memory" in decision.reason


def test_it_is_over_when_every_live_replica_answers_with_the_target() -> None:
    assert after_swap(NEW, {"a": BOTH, "b": ON_NEW}) == Wait("activating tiny@2: 1 of 2 replicas")
    assert isinstance(after_swap(NEW, {"a": ON_NEW, "b": ON_NEW}), Go)


SERVED = {
    "tiny": Served("tiny", "champion", (OLD,), (OLD, NEW), {"champion": 1, "next": 2, "gone": 9}),
    "blue": Served("blue", "stable", ("blue@4",), ("blue@4",), {"stable": 4}),
}


@pytest.mark.parametrize(
    ("model", "name", "version"),
    [
        ("tiny", "tiny", None),
        ("tiny@champion", "tiny", None),
        ("tiny@2", "tiny", NEW),
        ("tiny@1", "tiny", OLD),
        ("tiny@next", "tiny", NEW),
        ("blue", "blue", None),
        ("blue@stable", "blue", None),
    ],
)
def test_references_are_resolved(model: str, name: str, version: str | None) -> None:
    found, wanted = resolve(model, SERVED)
    assert (found.name, wanted) == (name, version)


@pytest.mark.parametrize(
    "model", ["tiny@3", "tiny@gone", "tiny@nix", "blue@champion", "tiny@run.a.1"]
)
def test_what_is_not_live_is_told_with_what_is(model: str) -> None:
    with pytest.raises(RequestError, match="versions of (tiny|blue) that are: ") as caught:
        resolve(model, SERVED)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_unknown_models_are_told_with_what_there_is() -> None:
    for model in ("nix", "Tiny", "", "tiny@@", "../x"):
        with pytest.raises(RequestError, match="there are: blue@stable, tiny"):
            resolve(model, SERVED)
    assert served_id(SERVED["tiny"]) == "tiny"


def test_an_actor_that_has_just_restarted_takes_no_model_away() -> None:
    tiny = {"tiny": SERVED["tiny"]}
    assert Snapshot({}, settled=False).over(tiny) == tiny
    assert Snapshot({}, settled=True).over(tiny) == {}
    assert Snapshot(SERVED, settled=False).over(tiny) == SERVED


async def test_the_swap_loses_against_somebody_else(library: Library) -> None:
    releases = Releases(library)
    await releases.report("tiny", "champion", "r0", ON_OLD)
    with pytest.raises(ReleaseError, match="points to version 1, not to 2"):
        await releases.promote("tiny", 2, expected=2)
    going = asyncio.create_task(releases.promote("tiny", 2))
    await until(lambda: releases._models["tiny"].target == NEW, "it asks for the target")
    publish(library, library.root.parent, mark="c")
    library.move_alias("tiny", "champion", 3, 1, "somebody else")
    await releases.report("tiny", "champion", "r0", BOTH)
    with pytest.raises(ReleaseError, match="points to version 3, not to version 1"):
        await going
    assert library.aliases("tiny") == {"champion": 3}
    assert releases._models["tiny"].target is None


async def test_a_promotion_that_takes_too_long_says_what_it_waited_for(library: Library) -> None:
    releases = Releases(library)
    await releases.report("tiny", "champion", "r0", ON_OLD)
    with pytest.raises(ReleaseError, match=r"0 of 1 replicas, still so after 0\.05 s.*nothing"):
        await releases.promote("tiny", 2, timeout_s=0.05)
    assert library.aliases("tiny") == {"champion": 1}
    assert releases._order("tiny", "champion", "r0") == Order(OLD, None)


async def test_a_dead_replica_is_not_waited_for_longer_than_it_takes_to_notice(
    library: Library,
) -> None:
    now = 0.0
    releases = Releases(library, clock=lambda: now)
    await releases.report("tiny", "champion", "dead", ON_OLD)
    now = LIVE_S + 1
    await releases.report("tiny", "champion", "live", BOTH)
    going = asyncio.create_task(releases.promote("tiny", 2))
    await until(lambda: library.aliases("tiny") == {"champion": 2}, "the alias moved")
    await releases.report("tiny", "champion", "live", ON_NEW)
    assert await going == 1


async def test_watch_answers_at_once_when_the_order_differs(library: Library) -> None:
    releases = Releases(library)
    assert await releases.watch("tiny", "champion", "r0", Report(), None) == Order(OLD)
    waiting = asyncio.create_task(releases.watch("tiny", "champion", "r0", ON_OLD, Order(OLD)))
    await until(lambda: releases._models["tiny"].reports == {"r0": ON_OLD}, "it reported")
    going = asyncio.create_task(releases.promote("tiny", 2, timeout_s=5))
    assert await waiting == Order(OLD, NEW)
    going.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going


async def test_promotions_of_what_does_not_exist_are_refused(library: Library) -> None:
    releases = Releases(library)
    with pytest.raises(UnknownModel):
        await releases.promote("tiny", 7)
    with pytest.raises(ReleaseError, match="not deployed"):
        await releases.promote("tiny", 2)


async def test_an_alias_that_nobody_serves_moves_without_loading(library: Library) -> None:
    releases = Releases(library)
    await releases.report("tiny", "champion", "r0", ON_OLD)
    assert await releases.promote("tiny", 2, alias="next") is None
    assert library.aliases("tiny") == {"champion": 1, "next": 2}
    served = (await releases.snapshot()).served["tiny"]
    assert served.aliases == {"champion": 1, "next": 2}


async def test_promotions_of_one_model_take_turns(library: Library) -> None:
    releases = Releases(library)
    await releases.report("tiny", "champion", "r0", BOTH)
    both = [asyncio.create_task(releases.promote("tiny", n, timeout_s=5)) for n in (2, 1)]
    await until(lambda: library.aliases("tiny")["champion"] == 2, "the first has swapped")
    await releases.report("tiny", "champion", "r0", ON_NEW)
    await until(lambda: library.aliases("tiny")["champion"] == 1, "then the second")
    await releases.report("tiny", "champion", "r0", BOTH)
    assert await asyncio.gather(*both) == [1, 2]
