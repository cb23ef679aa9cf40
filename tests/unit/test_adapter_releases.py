"""Releases of an adapter: both versions beside one base, the new one with a share of requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ReleaseError
from cluster.library import releases as records
from cluster.library.releases import Release
from serve_apps import adapters, release_control
from serve_apps.release_config import ReleasePolicy
from serve_apps.releases import Releases
from tests.unit.adapter_fixtures import Stage, put, stage
from tests.unit.serving_fixtures import publish, until

pytestmark = pytest.mark.anyio
EASY = {"ttft_p95": None, "tokens_per_s": None}
"""Gates that time nothing."""
HALF = {
    "gates": EASY,
    "traffic": {"steps": [{"percent": p, "for_s": 0, "requests": 8} for p in (50, 100)]},
}
FOREVER = {"gates": EASY, "traffic": {"steps": [{"percent": 50, "for_s": 600, "requests": 0}]}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "LOOK_S", 0.01)
    monkeypatch.setattr(release_control, "TURN_S", 0.002)
    monkeypatch.setattr(release_control, "LISTEN_S", 0.01)


@asynccontextmanager
async def two_of_red(tmp_path: Path, *configured: str) -> AsyncIterator[Stage]:
    """Serve red@1, with red@2 to red@3 in the library, and count as gateways do."""
    async with stage(tmp_path, configured or ("red", "blue")) as s:
        s.library.move_alias("red", "champion", 1, None, "test")
        for mark in (1, 2):
            put(s.library, tmp_path, "red", "tiny@1", mark)
        await until(lambda: "red" in s.releases._served(), "it is found")

        async def count() -> None:
            while True:
                await asyncio.sleep(0.002)
                await s.releases.count(s.traffic.drain())

        counting = asyncio.create_task(count())
        yield s
        counting.cancel()


def record(s: Stage) -> Release:
    return records.of(s.library.root, "red")[-1]


def happened(s: Stage) -> list[str]:
    return [entry.what for entry in record(s).entries if entry.what != "held"]


def policy(told: dict[str, Any], **more: Any) -> ReleasePolicy:
    return ReleasePolicy.model_validate(told | more)


async def answers(s: Stage) -> None:
    await until(lambda: "advanced" in happened(s), "the candidate answers")


async def test_RC05_an_adapters_version_gets_its_share_and_then_the_champions_place(
    tmp_path: Path,
) -> None:
    async with two_of_red(tmp_path) as s:
        asking = policy(HALF, gates=EASY | {"golden": [{"chat": "Hi", "regex": "(?s).*"}]})
        await s.releases.start_release("red", 2, asking, "me")
        await answers(s)
        said: dict[str, set[str]] = {}
        turn = 0
        while not record(s).over:
            who = f"p{turn % 20}"
            turn += 1
            version, base = await s.named("red", user=who)
            assert base == "tiny@1"
            said.setdefault(who, set()).add(version)
            if record(s).moved.step == 0:
                assert (await s.named("red@1"))[0] == "red@1", "it is what was asked for"
            assert (await s.named("blue"))[0] == "blue@1"
        assert happened(s) == ["started", "advanced", "advanced", "promoting", "promoted"]
        assert {"red@1", "red@2"} == set().union(*said.values())
        assert s.library.aliases("red") == {"champion": 2, "candidate": 2}
        assert (await s.named("red"))[0] == "red@2"
        assert list(s.engine._versions) == ["tiny@1"], "the base is not touched"


async def test_RC05_a_person_stays_on_one_side_of_an_adapters_release(tmp_path: Path) -> None:
    async with two_of_red(tmp_path) as s:
        await s.releases.start_release("red", 2, policy(FOREVER), "me")
        await answers(s)
        said = {
            who: {(await s.named("red", user=who))[0] for _ in range(3)}
            for who in (f"p{n}" for n in range(12))
        }
        assert all(len(versions) == 1 for versions in said.values())
        assert {"red@1", "red@2"} == set().union(*said.values())
        await s.releases.stop_release("red", "me")
        assert {(await s.named("red", user=who))[0] for who in said} == {"red@1"}


async def test_an_adapters_version_answers_in_the_shadow(tmp_path: Path) -> None:
    async with two_of_red(tmp_path) as s:
        steps = [{"percent": 0, "for_s": 600, "requests": 0}]
        shadows = policy(FOREVER, traffic={"steps": steps}, shadow={"percent": 100})
        await s.releases.start_release("red", 2, shadows, "me")
        await answers(s)
        going = s.releases._conductor._going["red"]
        while "red@2" not in going.counts or not going.counts["red@2"].shadows:
            assert (await s.named("red"))[0] == "red@1"
            await asyncio.sleep(0.005)
        assert not going.counts["red@2"].requests


async def test_T31_a_candidate_that_is_no_fit_or_does_not_load_ends_it(tmp_path: Path) -> None:
    async with two_of_red(tmp_path) as s:
        s.engine.bad_loads.add("red@2")
        publish(s.library, tmp_path, "other", "z")
        put(s.library, tmp_path, "red", "other@1", mark=3)
        for number, why in ((2, "red@2 cannot be served"), (4, "made for other@1")):
            await s.releases.start_release("red", number, policy(HALF), "me")
            await until(lambda: record(s).over, "it is over")
            assert happened(s) == ["started", "rolled_back"]
            assert why in record(s).entries[-1].why
        assert (await s.named("red"))[0] == "red@1"


async def test_a_candidate_is_read_before_anybody_asks_for_it(tmp_path: Path) -> None:
    async with two_of_red(tmp_path) as s:
        assert "red@2" not in s.engine._adapters, "neither what answers nor the newest"
        going = policy(FOREVER, traffic={"steps": [{"percent": 0, "for_s": 600}]})
        await s.releases.start_release("red", 2, going, "me")
        await answers(s)
        assert "red@2" in s.engine._adapters


async def test_golden_prompts_are_asked_of_the_adapter(tmp_path: Path) -> None:
    async with two_of_red(tmp_path) as s:
        asking = policy(HALF, gates=EASY | {"golden": [{"chat": "capital?", "equals": "Paris"}]})
        await s.releases.start_release("red", 2, asking, "me")
        await until(lambda: record(s).over, "it is over")
        assert "'capital?' was answered" in record(s).entries[-1].why


async def test_its_base_stays_awake_while_an_adapter_is_released(tmp_path: Path) -> None:
    async with two_of_red(tmp_path) as s:
        await s.releases.start_release("red", 2, policy(FOREVER), "me")
        await s.releases.unload("tiny")
        assert not s.releases._whole_order("tiny", "champion", "r0").asleep
        await s.releases.stop_release("red", "me")
        assert s.releases._whole_order("tiny", "champion", "r0").asleep


async def test_a_successor_goes_on_with_an_adapters_release(tmp_path: Path) -> None:
    async with two_of_red(tmp_path) as s:
        await s.releases.start_release("red", 2, policy(FOREVER), "me")
        await answers(s)
        told = s.releases._models["tiny"].reports["r0"]
        if task := s.releases._conductor._going["red"].task:
            task.cancel()
        heir = Releases(s.library)
        order = await heir.watch("tiny", "champion", "r0", told, None)
        assert order.tries == ("red@2",)
        canary = (await heir.snapshot()).served["red"].canary
        assert canary
        assert (canary.version, canary.percent) == ("red@2", 50)
        await heir.stop_release("red", "me")


async def test_what_has_no_alias_to_move_is_not_released(tmp_path: Path) -> None:
    async with stage(tmp_path, ("red", "blue@live")) as s:
        put(s.library, tmp_path, "red", "tiny@1", mark=1)
        put(s.library, tmp_path, "blue", "tiny@1", mark=1)
        await until(lambda: len(s.releases._served()) == 3, "they are found")
        with pytest.raises(ReleaseError, match="red@champion points to nothing; .*promote red@N"):
            await s.releases.start_release("red", 2, policy(HALF), "me")
        with pytest.raises(ReleaseError, match="blue follows the shelf"):
            await s.releases.start_release("blue", 1, policy(HALF), "me")
        with pytest.raises(ReleaseError, match="green is not deployed"):
            await s.releases.start_release("green", 1, policy(HALF), "me")
