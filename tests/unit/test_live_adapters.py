"""Adapters that follow the shelf: each version in the place of the one before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from serve_apps import adapters
from serve_apps.config import ModelConfig, ServeConfig
from serve_apps.deploy import check_adapters
from tests.unit.adapter_fixtures import Stage, put, stage
from tests.unit.serving_fixtures import AUTH, publish, two_versions, until

pytestmark = pytest.mark.anyio
FIRST, SECOND = "new@run.demo.9", "new@run.demo.10"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "LOOK_S", 0.01)


async def answering(s: Stage, ref: str, name: str = "new") -> None:
    """Wait until gateways know of one version of an adapter and no other."""

    def alone() -> bool:
        served = s.releases._served().get(name)
        return served is not None and served.active == (ref,)

    await until(alone, f"{ref} answers for {name}")


async def test_the_newest_on_the_shelf_answers_under_the_adapters_name_alone_and_live(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path, ("red", "new@live")) as s:
        assert (await s.ask("new")).status_code == 404, "no run has put anything there"
        s.shelf.made_for[FIRST] = "tiny@1"
        await answering(s, FIRST)
        for model in ("new", "new@live", FIRST):
            assert await s.named(model) == (FIRST, "tiny@1")
        assert await s.named("red") == ("red@1", "tiny@1")
        assert await s.named("tiny") == ("tiny@1", None)
        told = (await s.client.get("/v1/models", headers=AUTH)).json()["data"]
        assert {one["id"]: one.get("parent") for one in told} == {
            "tiny": None,
            "red": "tiny@1",
            "new@live": "tiny@1",
        }
        assert not s.shelf.leased, "the engine has a copy of its own"


async def test_a_newer_one_takes_its_place_and_what_runs_finishes_on_the_old(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path, ("new@live",), token_delay_s=0.02) as s:
        s.shelf.made_for[FIRST] = "tiny@1"
        await answering(s, FIRST)
        running = [asyncio.create_task(s.named("new")) for _ in range(3)]
        await until(lambda: len(s.engine._held) == 3, "they run")
        s.shelf.made_for[SECOND] = "tiny@1"
        await answering(s, SECOND)
        assert not any(task.done() for task in running), "else nothing was replaced meanwhile"
        assert (await s.named("new"))[0] == SECOND
        assert {version for version, _ in await asyncio.gather(*running)} == {FIRST}
        await until(lambda: list(s.engine._adapters) == [SECOND], "the old one is released")
        assert list(s.engine._versions) == ["tiny@1"]
        assert (await s.ask(FIRST)).status_code == 404


async def test_the_librarys_version_answers_before_and_after_a_run_without_a_gap(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path, ("red@live",)) as s:
        await answering(s, "red@1", "red")
        end, seen = asyncio.Event(), list[str]()

        async def ask_on() -> None:
            while not end.is_set():
                seen.append((await s.named("red"))[0])

        clients = [asyncio.create_task(ask_on()) for _ in range(3)]
        for ref in ("red@run.demo.1", "red@run.demo.2"):
            s.shelf.made_for[ref] = "tiny@1"
            await answering(s, ref, "red")
            await until(lambda ref=ref: ref in seen, f"{ref} has answered somebody")
        put(s.library, tmp_path, "red", "tiny@1", mark=1)  # as the run does at its end
        s.shelf.made_for.clear()
        await answering(s, "red@2", "red")
        await until(lambda: "red@2" in seen, "the library's version has, too")
        end.set()
        await asyncio.gather(*clients)
        assert {*seen} - {"red@1"} == {"red@run.demo.1", "red@run.demo.2", "red@2"}
        assert (await s.named("red"))[0] == "red@2"


async def test_what_is_withdrawn_gives_way_to_the_one_before(tmp_path: Path) -> None:
    async with stage(tmp_path, ("new@live",)) as s:
        for ref in (FIRST, SECOND):
            s.shelf.made_for[ref] = "tiny@1"
        await answering(s, SECOND)
        del s.shelf.made_for[SECOND]
        await answering(s, FIRST)
        assert (await s.named("new"))[0] == FIRST


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("other@1", "made for other@1, and this replica holds tiny@1"),
        ("/tmp/somewhere", "somewhere, and this replica holds tiny@1"),
        ("tiny@1", "cannot be served: it is one of bad_loads"),
        (None, "is a model, not an adapter"),
    ],
)
async def test_what_does_not_fit_is_refused_with_the_reason_and_the_one_before_stays(
    tmp_path: Path, base: str | None, told: str
) -> None:
    async with stage(tmp_path, ("new@live",)) as s:
        publish(s.library, tmp_path, "other", "z")
        s.shelf.made_for[FIRST] = "tiny@1"
        await answering(s, FIRST)
        s.engine.bad_loads.add(SECOND)
        s.shelf.made_for[SECOND] = base
        failed = s.releases._models["tiny"].reports
        await until(lambda: told in failed["r0"].failed.get(SECOND, ""), "the reason is reported")
        before = s.shelf.brought
        for _ in range(2):
            await s.replica._adapters.look()
        assert s.shelf.brought == before, "it is not tried again"
        assert told in (await s.ask(SECOND)).json()["error"]["message"]
        assert (await s.named("new"))[0] == FIRST
        assert not s.shelf.leased


async def test_a_shelf_that_is_away_is_asked_again(tmp_path: Path) -> None:
    async with stage(tmp_path, ("new@live",)) as s:
        s.shelf.away = True
        s.shelf.made_for[FIRST] = "tiny@1"
        await until(lambda: s.replica._adapters._live.problems, "it is told")
        told = (await s.ask("new")).json()["error"]
        assert told["code"] == "model_not_found"
        s.shelf.away = False
        await answering(s, FIRST)


async def test_the_base_that_it_was_trained_on_is_loaded_beside_the_one_that_answers(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path, ("new@live",)) as s:
        publish(s.library, tmp_path, mark="b")
        s.shelf.made_for[FIRST] = "tiny@2"
        await answering(s, FIRST)
        assert await s.named("new") == (FIRST, "tiny@2")
        assert await s.named("tiny") == ("tiny@1", None)
        s.shelf.made_for[SECOND] = "tiny@1"
        await answering(s, SECOND)
        await until(lambda: list(s.engine._versions) == ["tiny@1"], "nobody needs it any more")


async def test_it_takes_none_of_the_librarys_places(tmp_path: Path) -> None:
    async with stage(tmp_path, ("red", "blue", "new@live"), max_adapters=1) as s:
        s.shelf.made_for[FIRST] = "tiny@1"
        await answering(s, FIRST)
        for name, ref in (("red", "red@1"), ("blue", "blue@1"), ("new", FIRST), ("red", "red@1")):
            assert await s.named(name) == (ref, "tiny@1")


async def test_a_model_that_has_slept_takes_it_from_the_shelf_again(tmp_path: Path) -> None:
    async with stage(tmp_path, ("new@live",)) as s:
        s.shelf.made_for[FIRST] = "tiny@1"
        await answering(s, FIRST)
        await s.releases.unload("tiny")
        await until(lambda: s.replica._versions.sleeper.asleep, "it sleeps")
        s.engine._adapters.clear()  # what ends with an engine
        assert await s.named("new") == (FIRST, "tiny@1")
        assert list(s.engine._adapters) == [FIRST]


async def test_promotion_moves_the_alias_that_answers_while_the_shelf_has_nothing(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path, ("red@live",)) as s:
        put(s.library, tmp_path, "red", "tiny@1", mark=1)
        await answering(s, "red@2", "red")
        await s.releases.promote("red", 1)
        assert s.library.aliases("red") == {"live": 1}
        await answering(s, "red@1", "red")
        assert (await s.named("red"))[0] == "red@1"


def test_a_name_follows_the_shelf_once() -> None:
    config = ModelConfig.model_validate({"model": "tiny", "adapters": ["red", "new@live"]})
    assert (config.adapter_names, config.live_adapters) == (("red", "new"), ("new",))
    with pytest.raises(ValueError, match="red appears twice"):
        ServeConfig.model_validate({"models": [{"model": "tiny", "adapters": ["red", "red@live"]}]})


def test_a_deploy_knows_the_adapters_that_it_names(tmp_path: Path) -> None:
    library = two_versions(tmp_path)
    put(library, tmp_path, "red", "tiny@1")
    publish(library, tmp_path, "other", "z")

    def check(*names: str) -> None:
        config = ModelConfig.model_validate({"model": "tiny", "adapters": names or "auto"})
        check_adapters(config, library)

    check()
    check("red", "new@live")
    with pytest.raises(ConfigError, match=r"adapters of tiny: new.*or write new@live"):
        check("red", "new")
    for name in ("other", "other@live"):
        with pytest.raises(ConfigError, match="other is a model, not an adapter"):
            check(name)
