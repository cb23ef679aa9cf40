"""The numbers themselves: names, closed labels, and what a replica, a gateway and a run count."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import train_jobs.telemetry
from cluster import metrics
from cluster.meter import NullMeter, Tally
from cluster.metrics import version_label
from serve_apps.calls import Call, Event, Refusal
from serve_apps.config import Fake, Limits, ModelConfig
from serve_apps.engine.fake import FakeEngine
from serve_apps.engine.interface import EngineStats
from serve_apps.gateway.app import Gateway, make_app
from serve_apps.gateway.metering import EXACT, GONE, NAMED, HttpMeter, code_label, route_label
from serve_apps.metering import ReplicaMeter
from serve_apps.replica import Replica
from tests.unit.metrics_fixtures import MemoryMeter
from tests.unit.serving_fixtures import AUTH, CHAT, KEY, LocalBackend, OneKey, one_version, stack
from train_jobs.telemetry import Telemetry

pytestmark = pytest.mark.anyio
TINY = {"model_name": "tiny", "model_version": "1", "engine": "fake"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- names -------------------------------------------------------------------------------------


def test_names_are_unique_legal_and_carry_no_suffix_of_prometheus() -> None:
    names = [metric.name for metric in metrics.ALL]
    assert len(set(names)) == len(names)
    for metric in metrics.ALL:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name), "a colon is dropped by Ray"
        assert not metric.name.endswith(("_total", "_bucket", "_count", "_sum")), metric.name
        assert metric.help.endswith(".")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert all(bound > 0 for bound in metric.buckets)
    assert metrics.PROMPT_TOKENS.series == "ray_roundhouse_prompt_tokens_total"
    assert metrics.RUNNING.series == "ray_roundhouse_num_requests_running"


def test_every_histogram_of_seconds_has_a_true_mean_beside_it() -> None:
    timings = (
        *(metrics.TIME_TO_FIRST_TOKEN, metrics.INTER_TOKEN, metrics.E2E),
        *(metrics.QUEUE, metrics.HTTP),
    )
    assert {t.spread for t in timings} == {m for m in metrics.ALL if m.kind == "histogram"}
    for timing in timings:
        assert {timing.seconds.kind, timing.count.kind} == {"counter"}
        assert set(timing.seconds.labels) <= set(timing.count.labels)
        assert {timing.seconds, timing.count} <= set(metrics.ALL)


@pytest.mark.parametrize(
    ("version", "label"),
    [("tiny@3", "3"), ("tiny@run.a-b.17", "live"), ("tiny@champion", "live"), (None, "none")],
)
def test_version_labels_are_integers_or_live(version: str | None, label: str) -> None:
    assert version_label(version) == label


def test_a_tally_passes_on_once_and_never_nothing() -> None:
    meter = MemoryMeter()
    tally = Tally(meter)
    for value in (2.0, 3.0, 0.0):
        tally.add(metrics.PROMPT_TOKENS, value, **TINY)
    tally.add(metrics.QUEUE.seconds, 0.0, **TINY)
    assert not meter.series
    tally.flush()
    tally.flush()
    assert meter.get(metrics.PROMPT_TOKENS) == 5
    assert meter.get(metrics.QUEUE.seconds) == 0
    NullMeter().add(metrics.PROMPT_TOKENS, 1, **TINY)


# --- a replica ---------------------------------------------------------------------------------


@asynccontextmanager
async def measured(**fake: Any) -> AsyncIterator[tuple[Replica, MemoryMeter]]:
    config = ModelConfig(model="tiny", engine=Fake(kind="fake", **fake), drain_s=0.1)
    meter = MemoryMeter()
    engine = FakeEngine(config.engine)  # type: ignore[arg-type]
    replica = Replica(config, engine, one_version(), meter=meter)
    await replica.start()
    try:
        yield replica, meter
    finally:
        await replica.stop()


def call(prompts: tuple[str, ...] = ("Hello",), tokens: int = 4, name: str = "c") -> Call:
    return Call(name, tokens, False, prompts=prompts)


async def ask(replica: Replica, asked: Call) -> list[Event | Refusal]:
    return [event async for event in replica.generate(asked)]


async def test_an_answer_is_counted_once_with_its_tokens_and_times() -> None:
    async with measured(token_delay_s=0.005) as (replica, meter):
        await ask(replica, call(("Hello", "Hi"), 5))
    get = meter.get
    assert get(metrics.REQUEST_SUCCESS, finished_reason="length", **TINY) == 2
    assert get(metrics.REQUEST_FAILURE) == 0
    assert get(metrics.PROMPT_TOKENS, **TINY) == len("HelloHi")
    assert get(metrics.GENERATION_TOKENS, **TINY) == 10
    assert len(get(metrics.TIME_TO_FIRST_TOKEN.spread, **TINY)) == 2
    assert get(metrics.TIME_TO_FIRST_TOKEN.count) == 2
    assert get(metrics.INTER_TOKEN.count) == 8
    assert len(get(metrics.E2E.spread)) == 2
    # the parts add up to the whole: first tokens, then what lay between
    parts = get(metrics.TIME_TO_FIRST_TOKEN.seconds) + get(metrics.INTER_TOKEN.seconds)
    assert parts == pytest.approx(get(metrics.E2E.seconds), rel=0.01)
    assert get(metrics.E2E.seconds) == pytest.approx(sum(get(metrics.E2E.spread)))


async def test_the_wait_for_the_engine_and_cached_tokens_are_counted() -> None:
    async with measured(token_delay_s=0.02, max_concurrent=1) as (replica, meter):
        await asyncio.gather(ask(replica, call(tokens=2)), ask(replica, call(tokens=2, name="d")))
    get = meter.get
    waits = sorted(get(metrics.QUEUE.spread, **TINY))
    assert len(waits) == 2
    assert waits[0] < 0.02 < waits[1], "the second waited for the first"
    assert get(metrics.QUEUE.seconds, **TINY) == pytest.approx(sum(waits))
    assert get(metrics.CACHED_TOKENS, **TINY) == len("Hello") - 1


async def test_failures_have_a_reason_of_a_closed_set() -> None:
    async with measured(max_concurrent=1, max_queued=0, hang_at_token=2) as (replica, meter):
        running = replica.generate(call())
        await anext(running)
        assert isinstance((await ask(replica, call(name="d")))[0], Refusal)  # no room
        assert isinstance((await ask(replica, call(tokens=9_999)))[0], Refusal)  # too long
        await running.aclose()  # the client left
    async with measured(fail_at_token=2) as (replica, other):
        assert isinstance((await ask(replica, call(("a", "b"))))[-1], Refusal)
    for reason, count in (("busy", 1), ("refused", 1), ("cancelled", 1), ("engine", 0)):
        assert meter.get(metrics.REQUEST_FAILURE, reason=reason) == count, reason
    assert other.get(metrics.REQUEST_FAILURE, reason="engine") == 2
    assert meter.get(metrics.REQUEST_SUCCESS) == other.get(metrics.REQUEST_SUCCESS) == 0


async def test_a_bug_is_counted_and_still_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    async with measured() as (replica, meter):
        monkeypatch.setattr(replica, "_admit", None)
        with pytest.raises(TypeError):
            await ask(replica, call())
    assert meter.get(metrics.REQUEST_FAILURE, reason="error") == 1


def stats(active: str | None, running: int = 0, waiting: int = 0, used: int = 0) -> EngineStats:
    return EngineStats(running, waiting, used, 200, 0, 0, 0, 0, (), active)


def test_gauges_follow_the_active_version_and_waiting_adds_up() -> None:
    now = [0.0]
    meter = MemoryMeter()
    watch = ReplicaMeter(meter, "tiny", "fake", lambda: now[0])
    watch.look(stats("tiny@1", running=3, waiting=4, used=50))
    now[0] = 2.0
    watch.look(stats("tiny@1", running=3, waiting=4, used=50))
    one, two = TINY, {**TINY, "model_version": "2"}
    assert meter.get(metrics.RUNNING, **one) == [3]
    assert meter.get(metrics.CACHE_USAGE, **one) == [0.25]
    now[0] = 3.0
    watch.look(stats("tiny@2", running=1))
    assert meter.get(metrics.RUNNING, **one) == [0], "nothing is left of the old one"
    assert meter.get(metrics.VERSION_ACTIVE, **one) == [0]
    assert meter.get(metrics.VERSION_ACTIVE, **two) == [1]
    assert watch.labels(None)["model_version"] == "2"


async def test_measuring_ends_with_the_replica_and_survives_a_lost_engine() -> None:
    async with measured() as (replica, meter):
        task = replica._measuring
        assert task is not None
        replica._engine.kill()  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        assert not task.done()
    assert task.cancelled()


# --- the gateway -------------------------------------------------------------------------------


def test_T25_every_route_has_a_label_of_its_own() -> None:
    app = make_app(LocalBackend({}, {}), OneKey(), Limits())
    paths = {route.path for route in app.routes}  # type: ignore[attr-defined]
    assert paths == {*EXACT, *NAMED}
    assert {route_label(path) for path in paths} == paths
    for path in (
        "/v1/models/",
        "/v1/models/a/b",
        "/nix",
        "/v1/chat/completions/",
        "/V1/models",
        "/admin/models//load",
        "/admin/models/a/b/load",
        "/admin/models/a",
    ):
        assert route_label(path) == "other", path
    labels = {code_label(status) for status in [*range(100, 1000), GONE]}
    assert labels <= set(metrics.CODES)


async def test_T25_ten_thousand_made_up_requests_make_few_series() -> None:
    meter = MemoryMeter()
    async with stack() as s:
        app = make_app(s.backend, s.keys, Limits(), meter=HttpMeter(meter))
        methods = ("GET", "POST", "PUT", "DELETE", "PATCH", "BREW")

        async def send(message: Any) -> None:
            pass

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b'{"model": "m"}', "more_body": False}

        for n in range(10_000):
            key = KEY if n % 2 else f"rh-{n}"
            heads = (f"/v1/models/m{n}", f"/p{n}", CHAT, f"/v1/{n}/x", "/v1/models", "/metrics")
            scope = {
                "type": "http",
                "http_version": "1.1",
                "method": methods[n % 5],
                "path": heads[n % 6],
                "raw_path": b"",
                "query_string": f"q={n}".encode(),
                "headers": [(b"authorization", f"Bearer {key}".encode())],
            }
            with suppress(asyncio.CancelledError):
                await app(scope, receive, send)
    buckets = len(metrics.REQUEST_S) + 3
    histograms = len(meter.samples)
    assert len(meter.series) - histograms + histograms * buckets < 200
    assert meter.get(metrics.HTTP_REQUESTS) == 10_000
    assert meter.get(metrics.HTTP_REQUESTS, code="5xx") == 0


async def test_streams_count_as_they_end() -> None:
    meter = MemoryMeter()
    async with stack(fail_at_token=3) as s:
        app = make_app(s.backend, s.keys, Limits(), meter=HttpMeter(meter))
        s.client._transport = type(s.client._transport)(app=app)  # type: ignore[call-arg]
        broken = await s.chat(stream=True)
        assert broken.status_code == 200, "it was sent before the engine failed"
        assert (await s.client.get("/v1/models", headers=AUTH)).status_code == 200
    assert meter.get(metrics.HTTP_REQUESTS, route=CHAT, code="5xx") == 1
    assert meter.get(metrics.HTTP_REQUESTS, route=CHAT, code="2xx") == 0
    assert meter.get(metrics.HTTP_REQUESTS, route="/v1/models", code="2xx") == 1
    assert len(meter.get(metrics.HTTP.spread)) == 1, "only routes that generate"


async def test_metrics_need_a_key_and_a_source() -> None:
    async with stack() as s:
        assert (await s.client.get("/metrics")).status_code == 401
        missing = await s.client.get("/metrics", headers=AUTH)
        assert missing.status_code == 404
    assert Gateway(s.backend, Limits())._samples is None


# --- training ----------------------------------------------------------------------------------


def test_a_step_is_shown_whole_and_events_only_where_they_mean_something() -> None:
    meter = MemoryMeter()
    shown = Telemetry(meter, "tiny@2", now=lambda: 77.0)
    step = {"step": 3, "steps": 8, "loss": 1.5, "lr": 1e-3, "grad_norm": 0.5, "step_s": 2.0}
    step |= {"tokens_per_s": 90.0, "trained_tokens": 40, "eta_s": 10.0, "rewards/margins": 0.25}
    shown.report({"event": "ready", "steps": 8, "parameters": 5})
    assert not meter.series
    shown.report(step)
    shown.report({**step, "step": 4, "trained_tokens": 0})
    shown.report({"event": "evaluated", "when": "after", "loss": 0.9, "accuracy": 0.75})
    shown.report({"event": "checkpoint", "path": "/secret", "step": 4})
    labels = {"model_name": "tiny", "model_version": "2", "engine": "deepspeed"}
    assert meter.get(metrics.TRAIN_STEP, **labels) == [4]
    assert meter.get(metrics.TRAIN_LOSS) == [1.5]
    assert meter.get(metrics.TRAIN_HELDOUT_LOSS) == [0.9]
    assert meter.get(metrics.TRAIN_FIGURE, figure="rewards/margins") == [0.25]
    assert meter.get(metrics.TRAIN_HELDOUT_FIGURE, figure="accuracy") == [0.75]
    assert meter.get(metrics.TRAIN_CHECKPOINT_TIME) == [77.0]
    assert meter.get(metrics.TRAIN_STEPS) == 2
    assert meter.get(metrics.TRAIN_SECONDS) == 4.0
    assert meter.get(metrics.TRAIN_TOKENS) == 40
    assert {key[0] for key in meter.series} == {m.name for m in metrics.TRAINING}
    assert "/secret" not in str(meter.series)
    meter.gauges.clear()  # as Ray does with what nobody says again
    shown.again()
    assert meter.get(metrics.TRAIN_LOSS, **labels) == [1.5]
    assert meter.get(metrics.TRAIN_FIGURE, **labels, figure="rewards/margins") == [0.25]
    assert meter.get(metrics.TRAIN_STEPS) == 2, "a counter stays"


def test_the_keys_that_are_shown_are_those_of_the_loop() -> None:
    source = Path(train_jobs.telemetry.__file__).with_name("loop.py").read_text()
    for key in (*metrics.TRAIN_GAUGES, *metrics.TRAIN_COUNTERS):
        assert f'"{key}":' in source, key
