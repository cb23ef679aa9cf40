"""The real engine over its socket: the contract, two versions, and ranks that die or hang."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from cluster.errors import EngineError, RankLost, RequestError
from serve_apps.engine.interface import Chunk, Engine, EngineRequest, Sampling
from serve_apps.engine.sharded import ShardedEngine
from serve_apps.engine.stream import TokenStream
from tests.parity.engine_fixtures import (
    LocalRank,
    gone,
    greedy,
    local_model,
    opened,
    prompts,
    run_local,
    save_tiny,
    tiny_config,
)
from tests.unit.engine_contract import (
    CONTRACT,
    GREEDY,
    LONG,
    LoopThread,
    answer,
    ask,
    idle,
    release_drains_then_aborts,
    settled,
)

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def engine(loop: LoopThread, tiny: Path, tiny2: Path) -> Iterator[ShardedEngine]:
    engine = loop.run(opened(tiny_config(), m1=tiny, m2=tiny2))
    yield engine
    loop.run(engine.stop())
    assert engine.rank_pids[0]
    assert gone(engine.rank_pids[0])


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda f: f.__name__)
def test_the_real_engine_keeps_the_contract(
    promise: Callable[[Engine], Awaitable[None]], engine: ShardedEngine, loop: LoopThread
) -> None:
    async def run() -> None:
        await promise(engine)

    loop.run(run())


def test_release_drains_then_aborts(engine: ShardedEngine, loop: LoopThread, tiny2: Path) -> None:
    loop.run(release_drains_then_aborts(engine, lambda: engine.load("m@2", str(tiny2))))


def test_both_versions_answer_like_their_own_model(
    engine: ShardedEngine, loop: LoopThread, tiny: Path, tiny2: Path
) -> None:
    texts = prompts(2, seed=9)

    async def run() -> list[list[int]]:
        return await asyncio.gather(
            answer(engine, ask(tuple(texts[0]), 40), "m@1"),
            answer(engine, ask(tuple(texts[1]), 40), "m@2"),
        )

    wanted = [
        run_local(local_model(d), [greedy(t, 40)])[0]
        for d, t in zip((tiny, tiny2), texts, strict=True)
    ]
    assert loop.run(run()) == wanted


def test_an_update_under_load_moves_nobody_sc08(
    engine: ShardedEngine, loop: LoopThread, tiny: Path, tmp_path: Path
) -> None:
    """Requests of the old version end on it; the same prompt afterwards is answered afresh."""
    three = save_tiny(tmp_path, seed=3)
    prompt = tuple(prompts(1, seed=4)[0])

    async def run() -> tuple[list[int], list[int], list[int]]:
        old = asyncio.create_task(answer(engine, ask(prompt, LONG)))
        await settled(engine, lambda s: s.running == 1)
        await engine.load("m@3", str(three))
        assert not old.done(), "the load must fit into the long answer for this test to say much"
        await engine.activate("m@3")
        new = await answer(engine, ask(prompt, 50))
        before = await old
        await engine.activate("m@1")
        await engine.release("m@3", 1.0)
        return before, new, await answer(engine, ask(prompt, 50))

    before, new, again = loop.run(run())
    fresh = run_local(local_model(tiny), [greedy(prompt, LONG)])[0]
    assert before == fresh
    assert again == fresh[:50]
    assert new == run_local(local_model(three), [greedy(prompt, 50)])[0]


def test_seeds_over_the_socket_sc14(engine: ShardedEngine, loop: LoopThread) -> None:
    def warm(seed: int | None) -> object:
        return ask((5, 6), 30, Sampling(1.0, seed=seed))

    async def run() -> list[list[int]]:
        return [await answer(engine, warm(s)) for s in (1, 1, 2, None, None)]  # type: ignore[arg-type]

    one, again, two, *free = loop.run(run())
    assert one == again != two
    assert free[0] != free[1]


def test_what_was_cached_and_scored_is_told_sc18(
    engine: ShardedEngine, loop: LoopThread, tiny: Path
) -> None:
    prompt = tuple(prompts(3, seed=21, longest=60)[2])
    rules = Sampling(0.0, logprobs=2, prompt_logprobs=1)

    async def chunks(sampling: Sampling, salt: str) -> list[Chunk]:
        request = ask(prompt, 6, sampling, salt=salt)
        return [c async for c in engine.generate(request)]

    async def run() -> None:
        before = await engine.stats()
        first, again = await asyncio.gather(chunks(GREEDY, "a"), chunks(GREEDY, "a"))
        other, scored = await chunks(GREEDY, "b"), await chunks(rules, "a")
        told = [c[0].prompt.cached_tokens for c in (first, again, other, scored) if c[0].prompt]
        assert told == [0, 48, 0, 0], (
            "the second waits for the first; a salt hides; scores need all"
        )
        assert [c.prompt for c in first[1:]] == [None] * (len(first) - 1)
        after = await engine.stats()
        assert after.cached_prompt_tokens - before.cached_prompt_tokens == 48
        assert after.prompt_tokens - before.prompt_tokens == 4 * 60
        (alone,) = LocalRank(local_model(tiny)).run([EngineRequest("r", prompt, 6, rules)])
        assert [t for c in scored for t in c.token_ids] == alone.ids
        got = [one for c in scored for one in c.logprobs]
        assert [one.logprob for one in got] == pytest.approx([o.logprob for o in alone.logprobs])
        assert scored[0].prompt
        assert alone.prompt
        assert scored[0].prompt.logprobs == alone.prompt.logprobs

    loop.run(run())


def test_priorities_and_deadlines_over_the_socket_sc12(
    engine: ShardedEngine, loop: LoopThread
) -> None:
    async def run() -> None:
        before = await engine.stats()
        busy = [engine.generate(ask((3, 4, n), LONG)) for n in range(2)]
        late = engine.generate(ask(deadline_s=0.01))
        with pytest.raises(RequestError, match="deadline") as caught:
            await anext(late)
        assert caught.value.status == 504
        for stream in busy:
            await stream.aclose()
        await settled(engine, idle)

        # all admitted at once: nothing here depends on how fast the others answer
        order = list[str]()
        busy = [engine.generate(ask((3, 4, n), LONG)) for n in range(2)]
        last, first = (engine.generate(ask(max_tokens=3, priority=p)) for p in (1, -1))

        async def read(name: str, stream: TokenStream) -> None:
            assert sum([len(c.token_ids) async for c in stream]) == 3
            order.append(name)

        readers = [asyncio.create_task(read(*one)) for one in (("last", last), ("first", first))]
        await anext(busy[0])
        await busy[0].aclose()
        await asyncio.gather(*readers)
        assert order == ["first", "last"]
        await busy[1].aclose()
        after = await settled(engine, idle)
        assert after.expired == before.expired + 1

    loop.run(run())


def test_a_version_that_cannot_be_loaded_changes_nothing(
    engine: ShardedEngine, loop: LoopThread, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", num_hidden_layers=2)
    bloom = save_tiny(tmp_path / "bloom", "bloom")

    async def run() -> None:
        for directory, told in [(other, "shape"), (bloom, "'bloom'"), (tmp_path, "config.json")]:
            with pytest.raises(EngineError, match=told):
                await engine.load("m@8", str(directory))
        assert (await engine.stats()).versions == ("m@1", "m@2")
        assert len(await answer(engine, ask())) == 5

    loop.run(run())


def test_three_hundred_cancels_leave_nothing_behind_sc13(
    engine: ShardedEngine, loop: LoopThread
) -> None:
    async def run() -> None:
        for i in range(300):
            stream = engine.generate(ask((3, 4, 5), LONG))
            if i % 3:
                await anext(stream)
            await stream.aclose()
        await settled(engine, idle)
        assert not engine._answers

    loop.run(run())


def test_ids_outside_the_vocabulary_are_refused(engine: ShardedEngine, loop: LoopThread) -> None:
    async def run() -> None:
        for bad in (-1, 128, 10**9):
            with pytest.raises(RequestError, match=r"0\.\.127"):
                engine.generate(ask((1, bad)))

    loop.run(run())


def test_a_killed_rank_fails_every_waiter_fast(loop: LoopThread, tiny: Path) -> None:
    async def run() -> None:
        engine = await opened(tiny_config(), m1=tiny)
        streams = [engine.generate(ask(max_tokens=LONG)) for _ in range(4)]
        await anext(streams[0])
        assert engine.rank_pids[0]
        os.kill(engine.rank_pids[0], signal.SIGKILL)
        killed_at = time.monotonic()
        for stream in streams:
            with pytest.raises(RankLost):
                async for _ in stream:
                    pass
        assert time.monotonic() - killed_at < 5
        with pytest.raises(RankLost):
            await engine.check_health()
        with pytest.raises(RequestError) as caught:
            engine.generate(ask())
        assert caught.value.status == 503
        await engine.stop()

    loop.run(run())


def test_a_stopped_rank_is_found_and_killed(loop: LoopThread, tiny: Path) -> None:
    async def run() -> None:
        engine = await opened(tiny_config(step_timeout_s=1.0), m1=tiny)
        stream = engine.generate(ask(max_tokens=LONG))
        await anext(stream)
        assert engine.rank_pids[0]
        os.kill(engine.rank_pids[0], signal.SIGSTOP)
        stopped_at = time.monotonic()
        with pytest.raises(RankLost, match="step_timeout_s"):
            async for _ in stream:
                pass
        assert time.monotonic() - stopped_at < 5
        await engine.stop()
        assert gone(engine.rank_pids[0])

    loop.run(run())


def test_a_rank_dies_with_its_front(tiny: Path) -> None:
    front = (
        "import asyncio, os, signal\n"
        "from serve_apps.engine.sharded import ShardedEngine\n"
        "from tests.parity.engine_fixtures import tiny_config\n"
        "async def main():\n"
        "    engine = ShardedEngine(tiny_config())\n"
        "    await engine.start()\n"
        "    print(engine.rank_pids[0], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", front], stdout=subprocess.PIPE, timeout=60)
    pid, deadline = int(done.stdout), time.monotonic() + 5
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
