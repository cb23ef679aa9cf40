"""Which replicas load when: as the pace and their nodes' memory allow; back if one fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.errors import NotEnough, ReleaseError
from cluster.library.store import Library
from serve_apps import room
from serve_apps.engine.interface import EngineInfo
from serve_apps.release_policy import GiveUp, Go, Report, Wait
from serve_apps.releases import Releases
from serve_apps.rollout import granted, turns
from tests.unit.serving_fixtures import two_versions, until
from tests.unit.test_release_control import FakeReplica

pytestmark = pytest.mark.anyio
OLD, NEW = "tiny@1", "tiny@2"
GB = 1_000_000_000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return two_versions(tmp_path)


def on(node: str, free_gb: float, *held: str) -> Report:
    return Report(OLD, (OLD, *held), node=node, free_bytes=int(free_gb * GB))


def test_all_at_once_and_one_after_the_other() -> None:
    replicas = {"a": on("x", 1), "b": on("x", 1), "c": on("y", 1)}
    assert granted("all", NEW, replicas, (), GB) == {"a", "b", "c"}
    assert granted("one", NEW, replicas, (), GB) == {"a"}
    assert granted("one", NEW, replicas, {"a"}, GB) == {"a"}, "it still loads"
    replicas["a"] = on("x", 1, NEW)
    assert granted("one", NEW, replicas, {"a"}, GB) == {"a", "b"}
    assert granted("one", NEW, replicas, {"a"}, GB, done=()) == {"a"}, "its turn is not over"


def test_a_surge_fills_what_is_free_on_each_node() -> None:
    replicas = {"a": on("x", 2.5), "b": on("x", 2.4), "c": on("x", 2.5), "d": on("y", 0.5)}
    assert granted("surge", NEW, replicas, (), GB) == {"a", "b"}, "2.4 GB hold two, not three"
    replicas["a"] = on("x", 1.4, NEW)
    replicas["b"] = on("x", 1.4)
    assert granted("surge", NEW, replicas, {"a", "b"}, GB) == {"a", "b"}, "b takes the rest"
    nowhere = {"a": on("x", 0.1), "b": on("y", 0.1)}
    assert granted("surge", NEW, nowhere, (), GB) == {"a"}, "one tries, and says what lacks"


def test_turns_end_when_all_answer_and_at_the_first_failure() -> None:
    new = Report(NEW, (NEW,))
    assert isinstance(turns(NEW, {"a": new, "b": Report(OLD, (OLD,))}, ["a", "b"], ["a"]), Wait)
    assert isinstance(turns(NEW, {"a": new, "b": new}, ["a", "b"], ["a", "b"]), Go)
    for replicas, why in (
        ({"a": new, "b": Report(OLD, (OLD,), {NEW: "no"})}, "b could not load tiny@2: no"),
        ({"a": Report(), "b": new}, "a stopped answering"),
        ({"b": new}, "a died"),
    ):
        decision = turns(NEW, replicas, ["a", "b"], ["a"])
        assert isinstance(decision, GiveUp)
        assert why in decision.reason


async def test_a_promotion_in_turns_has_one_replica_between_two_versions(library: Library) -> None:
    releases = Releases(library)
    replicas = [FakeReplica(f"r{n}") for n in range(3)]
    tasks = [asyncio.create_task(one.follow(releases)) for one in replicas]
    await until(lambda: all(r.report.active for r in replicas), "all answer")
    going = asyncio.create_task(releases.promote("tiny", 2, pace="one"))
    between: list[int] = []
    while not going.done():
        between.append(sum(len(r.report.held) > 1 for r in replicas))
        await asyncio.sleep(0)
    assert await going == 1
    assert max(between) <= 1
    assert library.aliases("tiny") == {"champion": 2}
    await until(lambda: all(r.report == Report(NEW, (NEW,)) for r in replicas), "old is gone")
    for task in tasks:
        task.cancel()


async def test_when_one_cannot_those_that_flipped_go_back(library: Library) -> None:
    releases = Releases(library)
    replicas = [FakeReplica("r0"), FakeReplica("r1", {NEW: "no memory"}), FakeReplica("r2")]
    tasks = [asyncio.create_task(one.follow(releases)) for one in replicas]
    await until(lambda: all(r.report.active for r in replicas), "all answer")
    with pytest.raises(ReleaseError, match="r1 could not load tiny@2: no memory; nothing changed"):
        await releases.promote("tiny", 2, pace="one")
    assert library.aliases("tiny") == {"champion": 1}
    await until(lambda: all(r.report.active == OLD for r in replicas), "all answer as before")
    await until(lambda: all(r.report.held == (OLD,) for r in replicas), "and hold nothing else")
    for task in tasks:
        task.cancel()


def info(device: str = "cpu", dtype: str = "float32") -> EngineInfo:
    return EngineInfo(
        max_model_len=8, max_concurrent=1, max_queued=1, dtype=dtype, device=device, num_ranks=1,
        vocab_size=0,
    )  # fmt: skip


def test_what_does_not_fit_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: GB)
    with pytest.raises(NotEnough, match=r"tiny@2 needs 1,000 MB.*has 1,000 MB free"):
        room.check(NEW, 250_000_000, info())
    room.check(NEW, 250_000_000, info(), spare=500_000_000)
    room.check(NEW, 250_000_000, info(dtype="bfloat16"))
    room.check(NEW, 250_000_000, info(device="cuda"))
    room.check(NEW, None, info())


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 400000\n")
    assert room.free_bytes(tmp_path) == 900_000
    assert room.free_bytes(tmp_path / "none") > 0
