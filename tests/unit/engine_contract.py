"""The engine's contract as functions of one engine: the fake and the real one answer alike.

Each takes an engine that holds ``m@1`` (active) and ``m@2``, runs two requests and queues two
more, and takes a good second for LONG tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine
from threading import Thread
from typing import Any, TypeVar

import pytest

from cluster.errors import EngineError, RequestError
from serve_apps.engine.interface import Engine, EngineRequest, EngineStats, Sampling

T = TypeVar("T")
LONG = 400
GREEDY = Sampling(temperature=0.0)
_ids = itertools.count()


class LoopThread:
    """An event loop that keeps turning between the tests that share an engine."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coro: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return asyncio.run_coroutine_threadsafe(coro, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()


def ask(
    prompt: tuple[int, ...] = (40, 41, 42),
    max_tokens: int = 5,
    sampling: Sampling = GREEDY,
    stop_ids: tuple[int, ...] = (),
    **more: Any,
) -> EngineRequest:
    return EngineRequest(f"t{next(_ids)}", prompt, max_tokens, sampling, stop_ids, **more)


async def answer(engine: Engine, request: EngineRequest, version: str | None = None) -> list[int]:
    return [t async for c in engine.generate(request, version) for t in c.token_ids]


async def settled(
    engine: Engine, wanted: Callable[[EngineStats], bool], within_s: float = 5.0
) -> EngineStats:
    """Wait until the counters say so; tests only: products never poll."""
    deadline = time.monotonic() + within_s
    while not wanted(stats := await engine.stats()):
        assert time.monotonic() < deadline, stats
        await asyncio.sleep(0.02)
    return stats


def idle(stats: EngineStats) -> bool:
    return stats.running == stats.waiting == stats.cache_tokens_used == 0


async def streams_and_ends_by_length(engine: Engine) -> None:
    chunks = [c async for c in engine.generate(ask(max_tokens=6))]
    assert sum(len(c.token_ids) for c in chunks) == 6
    assert [c.finish for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 1, "the first token is flushed at once"


async def answers_depend_on_prompt_alone(engine: Engine) -> None:
    one, again, other = await asyncio.gather(
        answer(engine, ask((40, 41))), answer(engine, ask((40, 41))), answer(engine, ask((50, 77)))
    )
    assert one == again != other


async def a_stop_id_ends_the_answer_and_is_not_part_of_it(engine: Engine) -> None:
    whole = await answer(engine, ask(max_tokens=8))
    stop = whole[4]
    chunks = [c async for c in engine.generate(ask(max_tokens=8, stop_ids=(stop, 99_999)))]
    assert [t for c in chunks for t in c.token_ids] == whole[: whole.index(stop)]
    assert chunks[-1].finish == "stop"


async def one_token_is_an_answer_sc26(engine: Engine) -> None:
    assert len(await answer(engine, ask((7,), max_tokens=1))) == 1


async def closing_frees_what_it_held_sc12(engine: Engine) -> None:
    before = (await engine.stats()).aborted
    stream = engine.generate(ask(max_tokens=LONG))
    await anext(stream)
    assert (await engine.stats()).running == 1
    await stream.aclose()
    await stream.aclose()
    assert (await settled(engine, idle)).aborted == before + 1


async def dropping_or_cancelling_the_reader_frees_too_sc12(engine: Engine) -> None:
    stream = engine.generate(ask(max_tokens=LONG))
    await anext(stream)
    del stream
    await settled(engine, idle)
    task = asyncio.create_task(answer(engine, ask(max_tokens=LONG)))
    await settled(engine, lambda s: s.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settled(engine, idle)
    engine.generate(ask(max_tokens=LONG))  # never read, dropped at once
    await settled(engine, idle)


async def abort_from_elsewhere_ends_the_iterator(engine: Engine) -> None:
    request = ask(max_tokens=LONG)
    stream = engine.generate(request)
    first = await anext(stream)
    await engine.abort(request.request_id)
    chunks = [c async for c in stream]
    assert first.finish is None
    assert chunks[-1].finish == "abort"
    await engine.abort(request.request_id)
    await engine.abort("never heard of")
    await settled(engine, idle)


async def impossible_requests_are_refused_before_anything_is_sent(engine: Engine) -> None:
    limit = engine.info.max_model_len
    before = await engine.stats()
    for request, told in [
        (ask(()), "empty"),
        (ask(max_tokens=0), "max_tokens=0"),
        (ask(max_tokens=-3), "max_tokens=-3"),
        (ask((5,) * 20, max_tokens=limit), f"20 tokens .*{limit} more, {limit + 20} .*{limit}:"),
        (ask(sampling=Sampling(temperature=-1.0)), "temperature"),
        (ask(sampling=Sampling(temperature=float("nan"))), "temperature"),
        (ask(sampling=Sampling(top_p=0.0)), "top_p"),
        (ask(sampling=Sampling(top_k=-1)), "top_k"),
    ]:
        with pytest.raises(RequestError, match=told) as caught:
            engine.generate(request)
        assert caught.value.status == 400
    with pytest.raises(RequestError, match="m@9") as caught:
        engine.generate(ask(), "m@9")
    assert caught.value.status == 404
    assert await engine.stats() == before


async def a_full_queue_answers_429(engine: Engine) -> None:
    streams = [engine.generate(ask(max_tokens=LONG)) for _ in range(4)]
    with pytest.raises(RequestError) as caught:
        engine.generate(ask())
    assert caught.value.status == 429
    assert caught.value.retry_after_s
    assert caught.value.retry_after_s >= 1
    stats = await settled(engine, lambda s: s.running == 2)
    assert stats.waiting == 2
    for stream in streams:
        await stream.aclose()
    await settled(engine, idle)
    assert len(await answer(engine, ask())) == 5


async def an_id_in_use_is_refused(engine: Engine) -> None:
    request = ask(max_tokens=LONG)
    stream = engine.generate(request)
    with pytest.raises(RequestError) as caught:
        engine.generate(request)
    assert caught.value.status == 409
    await stream.aclose()
    await settled(engine, idle)


async def versions_answer_side_by_side(engine: Engine) -> None:
    one, two, active = await asyncio.gather(
        answer(engine, ask(), "m@1"), answer(engine, ask(), "m@2"), answer(engine, ask())
    )
    assert one == active != two
    assert (await engine.stats()).versions == ("m@1", "m@2")


async def a_version_is_fixed_at_admission(engine: Engine) -> None:
    alone = await answer(engine, ask(max_tokens=60))
    stream = engine.generate(ask(max_tokens=60))
    first = await anext(stream)
    await engine.activate("m@2")
    fresh = await answer(engine, ask(max_tokens=60))
    rest = [t async for c in stream for t in c.token_ids]
    await engine.activate("m@1")
    assert [*first.token_ids, *rest] == alone != fresh


async def what_has_no_token_moves_and_all_else_stays_sc10(engine: Engine) -> None:
    there = await answer(engine, ask(max_tokens=60), "m@2")
    begun = [engine.generate(ask(max_tokens=LONG)) for _ in range(2)]
    first = [await anext(stream) for stream in begun]
    waiting = engine.generate(ask(max_tokens=60))
    named = engine.generate(ask(max_tokens=60, pinned=True), "m@1")
    assert await engine.move("m@1", "m@2") == 1
    assert [s.version for s in (*begun, waiting, named)] == ["m@1", "m@1", "m@2", "m@1"]
    for stream in begun:
        await stream.aclose()
    moved = [t async for c in waiting for t in c.token_ids]
    stayed = [t async for c in named for t in c.token_ids]
    assert moved == there != stayed == await answer(engine, ask(max_tokens=60), "m@1")
    assert first[0].token_ids[0] == stayed[0]
    assert await engine.move("m@1", "m@2") == 0
    with pytest.raises(EngineError, match="not loaded"):
        await engine.move("m@1", "m@7")
    await settled(engine, idle)


async def the_active_or_an_unknown_version_is_not_released(engine: Engine) -> None:
    with pytest.raises(EngineError, match="active"):
        await engine.release("m@1", 0.0)
    with pytest.raises(EngineError, match="not loaded"):
        await engine.release("m@7", 0.0)
    with pytest.raises(EngineError, match="not loaded"):
        await engine.activate("m@7")


async def health_needs_a_token(engine: Engine) -> None:
    before = (await engine.stats()).generated_tokens
    await engine.check_health()
    busy = [engine.generate(ask(max_tokens=LONG)) for _ in range(4)]
    await engine.check_health()  # also while the queue is full
    for stream in busy:
        await stream.aclose()
    await settled(engine, idle)
    assert (await engine.stats()).generated_tokens >= before


CONTRACT: list[Callable[[Engine], Awaitable[None]]] = [
    streams_and_ends_by_length,
    answers_depend_on_prompt_alone,
    a_stop_id_ends_the_answer_and_is_not_part_of_it,
    one_token_is_an_answer_sc26,
    closing_frees_what_it_held_sc12,
    dropping_or_cancelling_the_reader_frees_too_sc12,
    abort_from_elsewhere_ends_the_iterator,
    impossible_requests_are_refused_before_anything_is_sent,
    a_full_queue_answers_429,
    an_id_in_use_is_refused,
    versions_answer_side_by_side,
    a_version_is_fixed_at_admission,
    what_has_no_token_moves_and_all_else_stays_sc10,
    the_active_or_an_unknown_version_is_not_released,
    health_needs_a_token,
]


async def release_drains_then_aborts(engine: Engine, reload: Callable[[], Awaitable[None]]) -> None:
    """Needs ``reload`` to bring m@2 back, so it stands apart from the list."""
    short = asyncio.create_task(answer(engine, ask(max_tokens=5), "m@2"))
    await asyncio.sleep(0)
    await engine.release("m@2", 10.0)
    assert len(await short) == 5, "drained, not aborted"
    with pytest.raises(RequestError):
        engine.generate(ask(), "m@2")
    await reload()
    stream = engine.generate(ask(max_tokens=LONG), "m@2")
    await anext(stream)
    await engine.release("m@2", 0.05)
    assert [c.finish async for c in stream][-1] == "abort"
    await reload()
    await settled(engine, idle)
