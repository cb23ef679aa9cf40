"""The fake engine keeps the contract, and fails when told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import EngineError, RankLost, RequestError
from serve_apps.config import Fake
from serve_apps.engine.fake import FakeEngine
from serve_apps.engine.interface import Engine
from serve_apps.engine.open import open_engine
from tests.unit.engine_contract import (
    CONTRACT,
    LONG,
    answer,
    ask,
    idle,
    release_drains_then_aborts,
    settled,
)


async def started(**knobs: Any) -> FakeEngine:
    config = {"max_concurrent": 2, "max_queued": 2, "max_model_len": 512, "token_delay_s": 0.002}
    engine = FakeEngine(Fake.model_validate({"kind": "fake", **config, **knobs}))
    await engine.start()
    await engine.load("m@1", "nowhere")
    await engine.load("m@2", "nowhere")
    await engine.activate("m@1")
    return engine


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda f: f.__name__)
def test_the_fake_keeps_the_contract(promise: Callable[[Engine], Awaitable[None]]) -> None:
    async def run() -> None:
        engine = await started()
        await promise(engine)
        await engine.stop()

    asyncio.run(run())


def test_release_drains_then_aborts() -> None:
    async def run() -> None:
        engine = await started()
        await release_drains_then_aborts(engine, lambda: engine.load("m@2", "nowhere"))

    asyncio.run(run())


def test_faults_come_at_the_token_that_was_named() -> None:
    async def run() -> None:
        failing = await started(fail_at_token=3)
        chunks = [c async for c in failing.generate(ask(max_tokens=9))]
        assert sum(len(c.token_ids) for c in chunks) == 2
        assert chunks[-1].finish == "error"
        assert chunks[-1].error
        hanging = await started(hang_at_token=2)
        stream = hanging.generate(ask(max_tokens=9))
        await anext(stream)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.05)
        await settled(hanging, idle)
        with pytest.raises(EngineError):
            await (await started(hang_at_token=1)).check_health()

    asyncio.run(run())


def test_a_version_may_bring_faults_of_its_own(tmp_path: Path) -> None:
    async def run() -> None:
        engine = await started()
        (tmp_path / "fake.json").write_text('{"fail_at_token": 2}')
        await engine.load("m@3", str(tmp_path))
        ends = {}
        for version in ("m@1", "m@3"):
            ends[version] = [c async for c in engine.generate(ask(max_tokens=4), version)][
                -1
            ].finish
        assert ends == {"m@1": "length", "m@3": "error"}
        (tmp_path / "fake.json").write_text('{"fail_at": 2}')
        with pytest.raises(EngineError, match=r"(?s)fake.json: .*fail_at"):
            await engine.load("m@4", str(tmp_path))

    asyncio.run(run())


def test_a_killed_engine_fails_every_reader_and_shuts_the_door() -> None:
    async def run() -> None:
        engine = await started()
        streams = [engine.generate(ask(max_tokens=LONG)) for _ in range(3)]
        await anext(streams[0])
        engine.kill()
        for stream in streams:
            with pytest.raises(RankLost):
                async for _ in stream:
                    pass
        with pytest.raises(RequestError) as caught:
            engine.generate(ask())
        assert caught.value.status == 503
        with pytest.raises(RequestError):
            await engine.check_health()

    asyncio.run(run())


def test_stop_drains_and_a_bad_load_changes_nothing() -> None:
    async def run() -> None:
        engine = await started()
        engine.bad_loads.add("m@3")
        with pytest.raises(EngineError):
            await engine.load("m@3", "nowhere")
        assert (await engine.stats()).versions == ("m@1", "m@2")
        short = asyncio.create_task(answer(engine, ask(max_tokens=20)))
        long = engine.generate(ask(max_tokens=LONG))
        await anext(long)
        await engine.stop(drain_s=0.3)
        assert len(await short) == 20
        assert [c.finish async for c in long][-1] == "abort"

    asyncio.run(run())


def test_a_slow_reader_gets_the_steps_it_missed_as_one_chunk() -> None:
    async def run() -> None:
        engine = await started(token_delay_s=0.0)
        stream = engine.generate(ask(max_tokens=30))
        await settled(engine, idle)
        chunks = [c async for c in stream]
        assert [len(c.token_ids) for c in chunks] == [30]
        assert chunks[0].finish == "length"

    asyncio.run(run())


def test_open_engine_follows_the_config() -> None:
    assert isinstance(open_engine(Fake(kind="fake")), FakeEngine)
