"""Adapters of a served model: found in the library, read when asked for, each under its name."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cluster.errors import ReleaseError, RequestError
from cluster.library.manifest import Facts
from serve_apps import adapters
from serve_apps.calls import Call, Event, Refusal
from serve_apps.config import ModelConfig, ServeConfig
from serve_apps.engine.lora_files import read_facts
from serve_apps.release_policy import resolve
from tests.unit.adapter_fixtures import put, stage
from tests.unit.serving_fixtures import AUTH, publish, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "LOOK_S", 0.01)


async def test_each_adapter_answers_under_its_own_name_and_says_its_base_sc11(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path) as s:
        asked = await asyncio.gather(*(s.named(m) for m in ("tiny", "red", "blue", "red@1")))
        assert asked == [
            ("tiny@1", None),
            ("red@1", "tiny@1"),
            ("blue@1", "tiny@1"),
            ("red@1", "tiny@1"),
        ]
        assert (await s.ask("green")).status_code == 404, "it is not configured"
        told = (await s.client.get("/v1/models", headers=AUTH)).json()["data"]
        parents = {one["id"]: one.get("parent") for one in told}
        assert parents == {"tiny": None, "red": "tiny@1", "blue": "tiny@1"}
        texts = {(await s.ask(m)).json()["choices"][0]["message"]["content"] for m in parents}
        assert len(texts) == 3


async def test_auto_serves_what_fits_the_version_that_answers(tmp_path: Path) -> None:
    async with stage(tmp_path, "auto") as s:
        assert await s.named("green") == ("green@1", "tiny@1")
        put(s.library, tmp_path, "late", "tiny@1")
        await until(lambda: "late" in s.releases._served(), "it is found")
        assert await s.named("late") == ("late@1", "tiny@1")
        publish(s.library, tmp_path, mark="b")
        await s.releases.promote("tiny", 2)
        await until(lambda: "red" not in s.releases._served(), "no adapter of tiny@1 fits")
        assert (await s.ask("red")).status_code == 404


async def test_a_new_version_of_the_base_never_moves_an_adapter(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        publish(s.library, tmp_path, mark="b")
        await s.releases.promote("tiny", 2)
        assert await s.named("tiny") == ("tiny@2", None)
        for _ in range(20):
            assert await s.named("red") == ("red@1", "tiny@1")
            await asyncio.sleep(0.005)
        assert sorted(s.engine._versions) == ["tiny@1", "tiny@2"]
        put(s.library, tmp_path, "red", "tiny@2", mark=1)
        put(s.library, tmp_path, "blue", "tiny@2", mark=1)
        for name in ("red", "blue"):
            await s.releases.promote(name, 2)
            assert await s.named(name) == (f"{name}@2", "tiny@2")
        await until(lambda: sorted(s.engine._versions) == ["tiny@2"], "nobody needs the old one")


async def test_a_base_of_equal_content_fits_under_any_name(tmp_path: Path) -> None:
    async with stage(tmp_path, ("twin",)) as s:
        source = tmp_path / "src-tiny-a"
        s.library.publish("copy", source, Facts())
        put(s.library, tmp_path, "twin", "copy@1")
        await until(lambda: "twin" in s.releases._served(), "it is found")
        assert await s.named("twin") == ("twin@1", "tiny@1")


async def test_promotion_of_an_adapter_leaves_the_base_alone(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.library.move_alias("red", "champion", 1, None, "test")
        put(s.library, tmp_path, "red", "tiny@1", mark=1)
        assert await s.named("red") == ("red@1", "tiny@1")
        assert await s.releases.promote("red", 2) == 1
        assert await s.named("red") == ("red@2", "tiny@1")
        assert await s.named("red@1") == ("red@1", "tiny@1")
        assert await s.named("red@champion") == ("red@2", "tiny@1")
        assert list(s.engine._versions) == ["tiny@1"]
        with pytest.raises(ReleaseError, match="requests finish on the version.*--update"):
            await s.releases.promote("red", 1, update="recompute")


async def test_an_adapter_that_does_not_load_is_not_promoted_and_says_why(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.library.move_alias("red", "champion", 1, None, "test")
        s.engine.bad_loads.add("red@2")
        put(s.library, tmp_path, "red", "tiny@1", mark=1)
        with pytest.raises(ReleaseError, match="red@2 cannot be served.*nothing changed"):
            await s.releases.promote("red", 2)
        publish(s.library, tmp_path, "other", "z")
        put(s.library, tmp_path, "red", "other@1", mark=2)
        with pytest.raises(ReleaseError, match="made for other@1, and this replica holds tiny@1"):
            await s.releases.promote("red", 3)
        assert await s.named("red") == ("red@1", "tiny@1")


async def test_the_least_recently_used_makes_room_and_comes_back(tmp_path: Path) -> None:
    async with stage(tmp_path, ("red", "blue", "green"), max_adapters=2) as s:
        for name in ("red", "blue", "green", "red", "green", "blue"):
            assert await s.named(name) == (f"{name}@1", "tiny@1")
            assert len(s.engine._adapters) <= 2
        assert sorted(s.engine._adapters) == ["blue@1", "green@1"]


async def test_when_all_places_are_in_use_one_more_is_told_to_wait(tmp_path: Path) -> None:
    async with stage(tmp_path, ("red", "blue"), max_adapters=1) as s:
        busy = s.replica._adapters.using("red@1")
        assert await busy.__aenter__() == ("red@1", "tiny@1")
        told = await s.ask("blue")
        assert (told.status_code, told.headers["retry-after"]) == (503, "2")
        assert "1 adapters answer right now" in told.json()["error"]["message"]
        await busy.__aexit__(None, None, None)
        assert await s.named("blue") == ("blue@1", "tiny@1")


async def test_a_replica_without_adapters_knows_none(tmp_path: Path) -> None:
    async with stage(tmp_path, ()) as s:
        asked = Call("c", 4, False, prompts=("Hi",), version="red@1")
        (told,) = [event async for event in s.replica.generate(asked)]
        assert isinstance(told, Refusal)
        assert (told.status, told.code) == (404, "model_not_found")
        with pytest.raises(RequestError, match="no model 'red' here"):
            resolve("red", s.releases._served())
        assert not isinstance(told, Event)


@pytest.mark.parametrize("name", ["red@2", "Red", ""])
def test_an_adapter_is_configured_by_its_name_alone(name: str) -> None:
    with pytest.raises(ValueError, match="adapters"):
        ModelConfig.model_validate({"model": "tiny", "adapters": [name]})


def test_one_name_one_model() -> None:
    models = [{"model": "tiny", "adapters": ["red"]}, {"model": "other", "adapters": ["red"]}]
    with pytest.raises(ValueError, match="red appears twice"):
        ServeConfig.model_validate({"models": models})


def test_patterns_decide_rank_and_scale_as_peft_matches_them(tmp_path: Path) -> None:
    told = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"layers.0.self_attn.q_proj": 4, "^k_proj": 2},
        "alpha_pattern": {"q_proj": 12},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    facts = read_facts(tmp_path, "a@1", 64)
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    assert (facts.rank(first), facts.rank(second), facts.rank("m.k_proj")) == (4, 8, 8)
    assert (facts.scale(first, 4), facts.scale("x.v_proj", 8)) == (3.0, 2.0)
