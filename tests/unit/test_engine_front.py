"""The front's side of the socket: what it imports, what a frame may be, what a lost rank does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import EngineError, RankLost, RequestError
from serve_apps.config import Sharded
from serve_apps.engine.interface import EngineRequest, Grammar, Logprob, PromptInfo, Sampling
from serve_apps.engine.sharded import ShardedEngine
from serve_apps.engine.wire import (
    HEADER,
    MAX_FRAME_BYTES,
    Frames,
    RankSpec,
    Told,
    pack,
    pack_request,
    unpack_sampling,
)
from tests.unit.engine_contract import answer, ask

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.floats()
MESSAGES = st.dictionaries(st.text(), SCALARS | st.lists(st.integers(0, 2**32)), max_size=5)


def test_the_front_never_imports_torch() -> None:
    probe = (
        "import sys, serve_apps.engine.sharded, serve_apps.engine.fake, serve_apps.engine.open, "
        "serve_apps.engine.runner, serve_apps.engine.scheduler; print(*sys.modules)"
    )
    loaded = subprocess.check_output([sys.executable, "-c", probe], text=True).split()
    assert {"torch", "transformers", "ray", "numpy"}.isdisjoint(loaded)


@given(st.lists(MESSAGES, max_size=4), st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_frames_survive_any_cutting(messages: list[dict[str, Any]], cuts: list[int]) -> None:
    stream, frames, got = b"".join(map(pack, messages)), Frames(), []
    while stream:
        cut, cuts = cuts[0], [*cuts[1:], cuts[0]]
        got += list(frames.feed(stream[:cut]))
        stream = stream[cut:]
    assert repr(got) == repr(messages)  # repr: a NaN is not equal to itself


@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(MAX_FRAME_BYTES + 1),
        HEADER.pack(2**32 - 1),
        HEADER.pack(1) + b"\xc1",  # the one byte that msgpack never uses
        HEADER.pack(1) + b"\x07",  # a bare number
        HEADER.pack(2) + b"\x07\x07",
        HEADER.pack(0),
    ],
    ids=["just too large", "huge", "not msgpack", "not a map", "two values", "empty"],
)
def test_a_bad_frame_ends_the_connection(frame: bytes) -> None:
    with pytest.raises(EngineError):
        list(Frames().feed(frame))


def test_too_large_a_message_is_not_sent() -> None:
    with pytest.raises(EngineError, match="exceeds"):
        pack({"x": b"0" * (MAX_FRAME_BYTES + 1)})


class ScriptedHost:
    """A rank made of a coroutine: it speaks frames over the real socket."""

    def __init__(self, spec: RankSpec, loop: asyncio.AbstractEventLoop, silent: bool) -> None:
        self.dead = asyncio.Event()
        self.heard: list[dict[str, Any]] = []
        self._silent, self.killed = silent, False
        self.loop = loop
        asyncio.run_coroutine_threadsafe(self._serve(spec), loop)

    async def _serve(self, spec: RankSpec) -> None:
        reader, self._writer = await asyncio.open_unix_connection(spec.socket)
        self.say({"t": "hello", "rank": spec.rank, "pid": 0, "device": "cpu"})
        frames = Frames()
        while data := await reader.read(1 << 16):
            for message in frames.feed(data):
                self.heard.append(message)
                if message["t"] == "load":
                    self.say({"t": "reply", "call": message["call"], "result": {"vocab_size": 9}})
                elif message["t"] == "admit" and not self._silent:
                    self.step(message["id"], 3, None)
                elif message["t"] == "stop":
                    self.kill()

    def say(self, message: dict[str, Any]) -> None:
        self._writer.write(pack(message))

    def step(self, request_id: str, token: int, finish: str | None) -> None:
        self.say({"t": "step", "n": len(self.heard), "out": [[request_id, [token], finish, None]]})

    async def ended(self) -> str:
        await self.dead.wait()
        return "was ended by signal 9"

    def kill(self) -> None:
        self.killed = True
        self.loop.call_soon_threadsafe(self.dead.set)


async def scripted(silent: bool = False, **knobs: Any) -> tuple[ShardedEngine, list[ScriptedHost]]:
    loop, hosts = asyncio.get_running_loop(), list[ScriptedHost]()

    def spawn(spec: RankSpec) -> ScriptedHost:
        hosts.append(ScriptedHost(spec, loop, silent))
        return hosts[-1]

    engine = ShardedEngine(Sharded.model_validate({"host": "process", **knobs}), spawn)
    await engine.start()
    await engine.load("m@1", "somewhere")
    await engine.activate("m@1")
    return engine, hosts


def test_a_dead_rank_fails_every_waiter_and_shuts_the_door() -> None:
    async def run() -> None:
        engine, (host,) = await scripted()
        streams = [engine.generate(ask((1, 2))) for _ in range(3)]
        for stream in streams:
            assert (await anext(stream)).token_ids == (3,)
        host.dead.set()
        for stream in streams:
            with pytest.raises(RankLost, match="signal 9"):
                await asyncio.wait_for(anext(stream), 2)
        with pytest.raises(RankLost):
            await engine.check_health()
        with pytest.raises(RequestError) as caught:
            engine.generate(ask((1, 2)))
        assert (caught.value.status, bool(caught.value.retry_after_s)) == (503, True)
        await engine.stop()

    asyncio.run(run())


def test_a_rank_that_makes_no_step_is_killed() -> None:
    async def run() -> None:
        engine, (host,) = await scripted(silent=True, step_timeout_s=0.3)
        with pytest.raises(RankLost, match="step_timeout_s"):
            await asyncio.wait_for(answer(engine, ask((1, 2))), 5)
        assert host.killed
        await engine.stop()

    asyncio.run(run())


def test_health_fails_when_no_token_comes() -> None:
    async def run() -> None:
        engine, (host,) = await scripted(silent=True, step_timeout_s=0.4)
        with pytest.raises(EngineError):
            await engine.check_health()
        await engine.stop()
        assert host.killed

    asyncio.run(run())


def test_a_rank_that_never_says_hello_is_told_by_name() -> None:
    class Mute:
        def __init__(self) -> None:
            self.dead = asyncio.Event()

        async def ended(self) -> str:
            await self.dead.wait()
            return "was killed"

        def kill(self) -> None:
            self.dead.set()

    async def run() -> None:
        host = Mute()
        config = Sharded(host="process", start_timeout_s=0.2)
        engine = ShardedEngine(config, lambda spec: host)
        with pytest.raises(EngineError, match="start_timeout_s"):
            await asyncio.wait_for(engine.start(), 20)
        assert host.dead.is_set()

    asyncio.run(run())


def test_seeds_of_any_size_travel() -> None:
    async def run() -> None:
        engine, (host,) = await scripted()
        for seed in (-1, 2**64 + 5, None):
            await anext(engine.generate(ask((1, 2), sampling=Sampling(seed=seed))))
        sent = [m["sampling"].get("seed") for m in host.heard if m["t"] == "admit"]
        assert sent == [2**64 - 1, 5, None]
        await engine.stop()

    asyncio.run(run())


def test_a_request_that_waited_too_long_is_told_so_sc12() -> None:
    async def run() -> None:
        engine, (host,) = await scripted(silent=True)
        late, other = ask((1, 2), deadline_s=0.5), ask((1, 2))
        streams = engine.generate(late), engine.generate(other)
        host.say({"t": "step", "n": 1, "out": [], "expired": [late.request_id, "long gone"]})
        with pytest.raises(RequestError, match="deadline") as caught:
            await asyncio.wait_for(anext(streams[0]), 2)
        assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
        assert caught.value.retry_after_s
        host.step(other.request_id, 3, "length")
        assert (await anext(streams[1])).token_ids == (3,)
        assert not engine._answers
        await engine.stop()

    asyncio.run(run())


def test_steps_that_nobody_read_come_as_one_chunk_with_all_they_said() -> None:
    async def run() -> None:
        engine, (host,) = await scripted(silent=True)
        request = ask((1, 2, 3))
        stream = engine.generate(request)
        prompt = PromptInfo(16, 0.25, (Logprob(2, -0.5, ((7, -0.1),)), Logprob(3, -0.25)))
        for n, token in enumerate((5, 6, 7)):
            said = Told(
                request.request_id,
                (token,),
                "stop" if n == 2 else None,
                None,
                (Logprob(token, -1.0 * n, ((token, -1.0 * n), (0, -9.0))),),
                None if n else prompt,
            )
            host.say({"t": "step", "n": n, "out": [said.pack()]})
        await asyncio.wait_for(settled_answer(engine, request.request_id), 5)
        (chunk,) = [c async for c in stream]
        assert (chunk.token_ids, chunk.finish, chunk.prompt) == ((5, 6, 7), "stop", prompt)
        assert [one.token_id for one in chunk.logprobs] == [5, 6, 7]
        assert chunk.logprobs[2].top == ((7, -2.0), (0, -9.0))
        await engine.stop()

    asyncio.run(run())


async def settled_answer(engine: ShardedEngine, request_id: str) -> None:
    while request_id in engine._answers:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.0, 0.5, 7, 2**63, 0.1, 0.5, -0.5, 1.1, ((3, -100.0), (5, 2.5)), 4, 20, 0),
        Sampling(grammar=Grammar("json_schema", '{"type": "object"}')),
    ],
)
def test_what_is_asked_arrives_whole(sampling: Sampling) -> None:
    request = EngineRequest("r", (1, 2), 0, sampling, (9,), -3, 1.5, "tenant")
    (got,) = Frames().feed(pack(pack_request(request, "m@1")))
    rest = (got["prompt"], got["max_tokens"], got["stop"], got["priority"], got["deadline_s"])
    assert unpack_sampling(got["sampling"]) == sampling
    assert rest == ([1, 2], 0, [9], -3, 1.5)
    assert (got["id"], got["version"], got["salt"]) == ("r", "m@1", "tenant")


@pytest.mark.parametrize(
    "told",
    [
        Told("r", (1, 2), None),
        Told("r", (), "error", "why"),
        Told("r", (4,), "length", None, (Logprob(4, -0.5, ((4, -0.5),)),)),
        Told("r", (), "length", None, (), PromptInfo(32, 0.5, (Logprob(1, -2.0),))),
    ],
)
def test_what_a_step_says_arrives_whole(told: Told) -> None:
    (got,) = Frames().feed(pack({"out": [told.pack()]}))
    assert Told.unpack(got["out"][0]) == told
