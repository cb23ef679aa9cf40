"""Adapters of a served model: found in the library, read when asked for, each under its name."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.errors import ReleaseError, RequestError
from cluster.library.manifest import Facts
from cluster.library.store import Library
from serve_apps import adapters
from serve_apps.calls import Call, Event, Refusal
from serve_apps.config import Fake, Limits, ModelConfig, ServeConfig
from serve_apps.engine.fake import FakeEngine
from serve_apps.engine.lora_files import read_facts
from serve_apps.gateway.app import make_app
from serve_apps.release_policy import resolve
from serve_apps.releases import Releases
from serve_apps.replica import Replica
from tests.unit.serving_fixtures import AUTH, CHAT, LocalBackend, OneKey, publish, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "LOOK_S", 0.01)


def put(library: Library, tmp_path: Path, name: str, base: str, mark: int = 0) -> str:
    """Publish one more version of an adapter."""
    source = tmp_path / f"src-{name}-{mark}"
    source.mkdir()
    told = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "mark": mark}
    (source / "adapter_config.json").write_text(json.dumps(told))
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = struct.pack("<Q", len(head)) + head + struct.pack("<f", 1.0)
    (source / "adapter_model.safetensors").write_bytes(weights)
    return library.publish(name, source, Facts(kind="adapter", base=base)).ref


@dataclass
class Stage:
    library: Library
    releases: Releases
    replica: Replica
    engine: FakeEngine
    client: httpx.AsyncClient

    async def ask(self, model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        return await self.client.post(CHAT, json=body, headers=AUTH)

    async def named(self, model: str) -> tuple[str, str | None]:
        """Return which version answered, and the base that the header says."""
        reply = await self.ask(model)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-roundhouse-model"] == reply.json()["system_fingerprint"]
        return reply.json()["system_fingerprint"], reply.headers.get("x-roundhouse-base")


class Following(LocalBackend):
    """A backend that goes by what the Releases object says at each request."""

    def __init__(self, replica: Replica, releases: Releases) -> None:
        super().__init__({"tiny": replica}, {})
        self._releases = releases

    def served(self):  # type: ignore[no-untyped-def]
        return self._releases._served()


@asynccontextmanager
async def stage(
    tmp_path: Path, configured: object = ("red", "blue"), max_adapters: int = 4
) -> AsyncIterator[Stage]:
    library = Library(tmp_path / "library")
    publish(library, tmp_path, mark="a")
    library.move_alias("tiny", "champion", 1, None, "test")
    for name in ("red", "blue", "green"):
        put(library, tmp_path, name, "tiny@1")
    engine = Fake(kind="fake", max_adapters=max_adapters)
    config = ModelConfig.model_validate(
        {"model": "tiny", "engine": engine, "drain_s": 2.0, "adapters": configured}
    )
    releases, fake = Releases(library), FakeEngine(engine)
    replica = Replica(config, fake, library, releases, "r0")
    app = make_app(Following(replica, releases), OneKey(), Limits())
    try:
        await replica.start()
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://gate"
        ) as client:
            yield Stage(library, releases, replica, fake, client)
    finally:
        await replica.stop()


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
        assert await busy.__aenter__() == "tiny@1"
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
