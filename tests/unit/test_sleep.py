"""Models that leave memory and come back: the decision, what is remembered, and the door."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import metrics
from cluster.errors import RequestError
from cluster.library.manifest import Facts
from cluster.library.store import Library
from cluster.metrics import Metric
from serve_apps import metering, room
from serve_apps.calls import Call, Event, Refusal
from serve_apps.config import Fake, ModelConfig
from serve_apps.engine.fake import FakeEngine
from serve_apps.engine.restart import Restartable
from serve_apps.release_policy import Report
from serve_apps.releases import Releases
from serve_apps.replica import Replica
from serve_apps.sleep_keeper import LOAD_S, WANTED_S, Known, SleepKeeper
from serve_apps.sleep_policy import Tenant, decide, most_on_a_node
from tests.unit.metrics_fixtures import MemoryMeter
from tests.unit.serving_fixtures import write_model

GB = 10**9


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def tenant(name: str, idle_s: float, need: float = 1.0, **more: object) -> Tenant:
    return Tenant(name, False, False, idle_s, None, {"n": int(need * GB)}, **more)  # type: ignore[arg-type]


def out(one: Tenant) -> Tenant:
    return replace(one, asleep=True, ordered=True)


def test_what_is_idle_for_long_sleeps_and_what_is_busy_does_not() -> None:
    models = [
        replace(tenant("idle", 61.0), limit_s=60.0),
        replace(tenant("short", 59.0), limit_s=60.0),
        replace(tenant("busy", 0.0), limit_s=60.0, unload=True),
        replace(tenant("asked", 99.0), limit_s=60.0, wanted=True),
        tenant("never", 1e6),
        tenant("told", 0.5, unload=True),
    ]
    assert decide(models).asleep == {"idle", "told"}


def test_one_that_was_told_to_sleep_and_has_a_request_after_all_goes_on() -> None:
    assert decide([replace(tenant("m", 0.0), ordered=True)]).asleep == set()
    assert decide([replace(tenant("m", 1.0), ordered=True)]).asleep == {"m"}
    assert decide([out(tenant("m", 1.0))]).asleep == {"m"}
    assert decide([replace(out(tenant("m", 1.0)), wanted=True)]).asleep == set()


def test_the_longest_unused_makes_room_and_the_other_waits_until_it_has_left() -> None:
    old, new = tenant("old", 50.0), tenant("new", 5.0)
    asked = replace(out(tenant("asked", 100.0)), wanted=True)
    told = decide([asked, new, old], 2 * GB)
    assert told.asleep == {"asked", "old"}
    assert told.waits["asked"] == "asked waits until old has left"
    told = decide([asked, new, replace(old, ordered=True)], 2 * GB)
    assert told.asleep == {"asked", "old"}
    assert decide([asked, new, out(old)], 2 * GB).asleep == {"old"}


def test_nobody_sleeps_for_one_that_does_not_fit_even_so() -> None:
    asked = replace(out(tenant("asked", 100.0, 1.5)), wanted=True)
    told = decide([asked, tenant("busy", 0.0), tenant("idle", 9.0)], 2 * GB)
    assert told.asleep == {"asked"}
    assert told.waits["asked"] == (
        "asked needs 1.50 GB and models may take 2.00 GB of a node's memory "
        "(limits.models_memory_gb); in use: busy 1.00 GB, idle 1.00 GB"
    )
    assert decide([asked], 2 * GB).asleep == set()
    assert "needs 1.50 GB" in decide([asked], GB).waits["asked"]


def test_a_smaller_budget_and_a_new_model_have_the_longest_unused_leave() -> None:
    models = [tenant("a", 10.0), tenant("b", 20.0), tenant("c", 0.0)]
    assert decide(models, 2 * GB).asleep == {"b"}
    assert decide(models, GB).asleep == {"a", "b"}
    new = tenant("new", 0.0, starting=True)
    assert decide([tenant("c", 0.0), new], GB).asleep == {"new"}, "it begins asleep"
    assert decide([tenant("c", 3.0), new], GB).asleep == {"c"}


@pytest.mark.parametrize(("wanted_s", "comes"), [(WANTED_S, False), (LOAD_S, True)])
def test_what_an_operator_loads_is_wanted_until_others_have_had_time_to_leave(
    wanted_s: float, comes: bool
) -> None:
    now = [0.0]
    keeper = SleepKeeper(lambda: now[0])
    keeper.budget = GB
    asleep = Report(None, (), asleep=True, need_bytes=GB)
    awake = Report("o@1", ("o@1",), idle_s=50.0, need_bytes=GB)
    models = {"m": Known({"r": asleep}, False, lambda: GB), "o": Known({"r": awake}, False, int)}
    keeper.look(models)
    keeper.wake("m", wanted_s)
    keeper.look(models)
    assert keeper.ordered("o"), "it makes room"
    assert keeper.ordered("m"), "and has not left yet"
    now[0] = WANTED_S + 20.0
    keeper.look(models | {"o": Known({"r": asleep}, False, int)})
    assert keeper.ordered("m") is not comes


def test_only_what_shares_a_node_leaves() -> None:
    asked = replace(out(tenant("asked", 9.0)), wanted=True)
    far = replace(tenant("far", 99.0), needs={"m": GB})
    assert decide([asked, far, tenant("near", 1.0)], GB).asleep == {"asked", "near"}


async def replica_of(
    releases: Releases,
    library: Library,
    wake_s: float,
    meter: MemoryMeter | None = None,
    **more: float,
) -> Replica:
    config = ModelConfig(
        model="tiny", engine=Fake(kind="fake", token_delay_s=0.02), wake_s=wake_s, **more
    )  # type: ignore[arg-type]
    engine = Restartable(lambda: FakeEngine(config.engine))  # type: ignore[arg-type]
    replica = Replica(config, engine, library, releases, "r1", meter)
    await replica.start()
    return replica


async def answer(replica: Replica, number: int = 0) -> list[Event | Refusal]:
    call = Call(f"c{number}", max_tokens=4, clip=False, prompts=("hello",))
    return [event async for event in replica.generate(call)]


async def measured(meter: MemoryMeter, metric: Metric, value: float) -> None:
    async with asyncio.timeout(10):
        while meter.get(metric, model_name="tiny") != [value]:
            await asyncio.sleep(0.02)


async def until(releases: Releases, asleep: bool) -> None:
    async with asyncio.timeout(10):
        while (await releases.sleeping())["tiny"] is not asleep:
            await asyncio.sleep(0.02)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    made = Library(tmp_path / "library")
    made.publish("tiny", write_model(tmp_path / "model"), Facts())
    return made


@pytest.mark.anyio
async def test_RC12_a_model_that_left_answers_its_next_requests_after_waking_once(
    library: Library,
) -> None:
    releases = Releases(library)
    replica = await replica_of(releases, library, 10)
    first = [answer(replica, n) for n in range(3)]
    running = asyncio.gather(*first)
    await asyncio.sleep(0.03)
    await releases.unload("tiny")  # busy: it goes on to the end
    for events in await running:
        assert isinstance(events[-1], Event)
        assert events[-1].finish
    await until(releases, True)
    served = (await releases.snapshot()).served["tiny"]
    assert (served.asleep, served.active, served.live) == (True, ("tiny@1",), ("tiny@1",))
    await replica.check_health()  # to sleep is no illness
    for events in await asyncio.gather(*(answer(replica, n) for n in range(5))):
        assert isinstance(events[-1], Event), events
        assert (events[-1].finish, events[-1].version) == ("length", "tiny@1")
    assert (await releases.sleeping()) == {"tiny": False}
    await replica.check_health()
    await replica.stop()


@pytest.mark.anyio
async def test_who_waits_too_long_is_told_when_to_come_back_and_what_it_waits_for(
    library: Library,
) -> None:
    releases = Releases(library)
    replica = await replica_of(releases, library, 1.5)
    await releases.unload("tiny")
    await until(releases, True)
    other = Report("big@1", ("big@1",), node=room.node(), idle_s=0.0, need_bytes=2 * GB)
    await releases.report("big", "champion", "r2", other)
    releases._sleep._estimates["tiny"] = GB
    await releases.keep_within(2 * GB)
    (refusal,) = await answer(replica)
    assert isinstance(refusal, Refusal)
    error = refusal.error()
    assert isinstance(error, RequestError)
    assert (error.status, error.code) == (503, "model_asleep")
    assert error.retry_after_s
    assert "1.5 s (wake_s)" in str(error)
    assert "in use: big 2.00 GB" in str(error)
    await replica.stop()


@pytest.mark.anyio
async def test_who_sleeps_and_what_waking_took_is_counted(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "PERIOD_S", 0.01)
    monkeypatch.setattr("serve_apps.releases.WATCH_S", 0.2)  # how often it tells that it is idle
    releases, meter = Releases(library), MemoryMeter()
    replica = await replica_of(releases, library, 10, meter)
    await measured(meter, metrics.MODEL_ASLEEP, 0)
    await measured(meter, metrics.VERSION_ACTIVE, 1)
    for times in (1, 2):
        await releases.unload("tiny")
        await measured(meter, metrics.MODEL_ASLEEP, 1)
        await measured(meter, metrics.VERSION_ACTIVE, 0)
        await answer(replica)
        await measured(meter, metrics.MODEL_ASLEEP, 0)
        assert meter.get(metrics.WAKEUPS) == times
    sleeper = replica._versions.sleeper
    assert sleeper.wakes == 2
    assert meter.get(metrics.WAKEUP_SECONDS) == pytest.approx(sleeper.waking_s)
    assert 0 < sleeper.waking_s < 10
    await replica.stop()


def test_what_a_model_takes_is_told_of_the_node_where_it_takes_most() -> None:
    one = Report("m@1", ("m@1",), node="a", need_bytes=3)
    other = Report("m@1", ("m@1",), node="b", need_bytes=4)
    assert most_on_a_node([one, one, other]) == 6
    assert most_on_a_node([replace(one, need_bytes=None)]) is None


@pytest.mark.anyio
async def test_who_follows_learns_what_models_take_and_is_not_woken_by_it(
    library: Library,
) -> None:
    releases = Releases(library)
    report = Report("tiny@1", ("tiny@1",), node="n", need_bytes=5)
    await releases.report("tiny", "champion", "r1", report)
    first = await releases.snapshot()
    assert first.served["tiny"].memory_bytes == 5
    await releases.report("tiny", "champion", "r1", replace(report, need_bytes=6))
    assert (await releases.snapshot()) == first, "no other order of things"
