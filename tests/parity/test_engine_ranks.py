"""Several ranks answer like one, and die like one."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from cluster.errors import ConfigError, EngineError, RankLost
from serve_apps.engine.interface import Engine, EngineRequest
from serve_apps.engine.sharded import ShardedEngine
from tests.parity.engine_fixtures import (
    Reference,
    compare,
    gone,
    greedy,
    opened,
    save_tiny,
    tiny_config,
)
from tests.unit.engine_contract import CONTRACT, LONG, LoopThread, answer, ask

pytestmark = pytest.mark.parity


async def answers(
    engine: Engine, requests: Sequence[EngineRequest], version: str | None = None
) -> list[list[int]]:
    return list(await asyncio.gather(*(answer(engine, r, version) for r in requests)))


@pytest.fixture(scope="module")
def pair(loop: LoopThread, tiny: Path, tiny2: Path) -> Iterator[ShardedEngine]:
    """Two ranks that hold two versions."""
    engine = loop.run(opened(tiny_config(tensor_parallel=2), m1=tiny, m2=tiny2))
    yield engine
    loop.run(engine.stop())
    assert all(gone(pid) for pid in engine.rank_pids)


def test_smollm2_on_three_ranks_answers_like_one_and_like_transformers(
    loop: LoopThread, smollm2: Path, smollm2_reference: Reference
) -> None:
    texts, (ids, gaps) = smollm2_reference
    texts, theirs = texts[:8], (ids[:8], gaps[:8])
    config = tiny_config(tensor_parallel=3, max_concurrent=20, max_queued=20, max_batch_tokens=128)

    async def run() -> list[list[int]]:
        engine = await opened(config, m1=smollm2)
        try:
            requests = [greedy(p, 64, f"r{i}") for i, p in enumerate(texts)]
            return await answers(engine, requests)
        finally:
            await engine.stop()

    compare(loop.run(run(), timeout_s=240), theirs)


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda f: f.__name__)
def test_two_ranks_keep_the_contract(
    promise: Callable[[Engine], Awaitable[None]], pair: ShardedEngine, loop: LoopThread
) -> None:
    async def run() -> None:
        await promise(pair)

    loop.run(run())


def test_each_rank_holds_its_share_only(pair: ShardedEngine, tiny: Path) -> None:
    with safe_open(tiny / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    everywhere = sum(n for name, n in sizes.items() if "norm" in name or "embed" in name)
    share = everywhere + (sum(sizes.values()) - everywhere) // 2
    assert pair.weight_bytes["m@1"] == [share, share]
    assert everywhere < share / 2, "else this shows nothing"


def test_a_version_that_one_rank_cannot_read_changes_nothing(
    pair: ShardedEngine, loop: LoopThread, tmp_path: Path, tiny: Path
) -> None:
    broken = save_tiny(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    async def run() -> None:
        before = await answer(pair, ask())
        with pytest.raises(EngineError, match="cannot be loaded"):
            await pair.load("m@3", str(broken))
        assert await answer(pair, ask()) == before
        await pair.load("m@3", str(tiny))
        assert await answer(pair, ask(), "m@3") == before
        await pair.release("m@3", 1.0)

    loop.run(run())


def test_RC02_what_one_rank_alone_cannot_read_is_held_by_none(
    pair: ShardedEngine, loop: LoopThread, tiny: Path
) -> None:
    follower = psutil.Process(pair.rank_pids[1])
    before = follower.rlimit(psutil.RLIMIT_NOFILE)

    async def run() -> None:
        first = await answer(pair, ask())
        follower.rlimit(psutil.RLIMIT_NOFILE, (3, before[1]))  # no file more
        try:
            with pytest.raises(EngineError, match="Too many open files"):
                await pair.load("m@3", str(tiny))
        finally:
            follower.rlimit(psutil.RLIMIT_NOFILE, before)
        assert "m@3" not in (await pair.stats()).versions
        assert await answer(pair, ask()) == first
        await pair.load("m@3", str(tiny))
        assert await answer(pair, ask(), "m@3") == first, "the ranks are still in step"
        await pair.release("m@3", 1.0)

    loop.run(run())


def test_what_cannot_be_cut_is_refused_before_it_is_read(
    pair: ShardedEngine, loop: LoopThread, tmp_path: Path
) -> None:
    odd = save_tiny(tmp_path / "odd", num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2", num_key_value_heads=4)

    async def run() -> None:
        with pytest.raises(ConfigError, match="does not divide num_attention_heads=3.*use 1$"):
            await pair.load("odd@1", str(odd))
        with pytest.raises(EngineError, match="'gpt2' has no tensor-parallel plan"):
            await pair.load("gpt2@1", str(gpt2))

    loop.run(run())


@pytest.mark.parametrize("rank", [0, 1])
def test_T30_a_killed_rank_takes_the_others_with_it(
    rank: int, loop: LoopThread, tiny: Path
) -> None:
    async def run() -> list[int]:
        engine = await opened(tiny_config(tensor_parallel=2), m1=tiny)
        streams = [engine.generate(ask(max_tokens=LONG)) for _ in range(4)]
        await anext(streams[0])
        killed_at = time.monotonic()
        os.kill(engine.rank_pids[rank], signal.SIGKILL)
        for stream in streams:
            with pytest.raises(RankLost):
                async for _ in stream:
                    pass
        assert time.monotonic() - killed_at < 10  # the target is 2
        with pytest.raises(RankLost):
            await engine.check_health()
        await engine.stop()
        return engine.rank_pids

    assert all(gone(pid) for pid in loop.run(run()))


@pytest.mark.parametrize("busy", [True, False], ids=["in a step", "idle"])
def test_T30_a_stopped_follower_is_found_and_killed(
    busy: bool, loop: LoopThread, tiny: Path
) -> None:
    async def run() -> list[int]:
        engine = await opened(tiny_config(tensor_parallel=2, step_timeout_s=2.0), m1=tiny)
        stream = engine.generate(ask(max_tokens=LONG if busy else 1))
        await anext(stream)
        os.kill(engine.rank_pids[1], signal.SIGSTOP)
        stopped_at = time.monotonic()
        if busy:
            with pytest.raises(RankLost):
                async for _ in stream:
                    pass
        while True:  # idle: the heartbeat is missed, or rank 0 misses it in a collective
            try:
                await engine.stats()
            except EngineError:
                break
            assert time.monotonic() - stopped_at < 30
            await asyncio.sleep(0.1)
        assert time.monotonic() - stopped_at < 30  # the target is 6
        await engine.stop()
        return engine.rank_pids

    assert all(gone(pid) for pid in loop.run(run()))
