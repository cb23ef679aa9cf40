"""The front of our engine: lives in the replica's event loop, and never imports torch.

It checks and admits requests, hands them to rank 0 over one local socket, and passes each step's
tokens to whom they belong. What the rank knows better (slots, steps, weights) stays there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import errors
from cluster.errors import EngineError, RankLost, RequestError
from serve_apps.config import Sharded
from serve_apps.engine.hosts import ActorHost, Host, ProcessHost
from serve_apps.engine.interface import Engine, EngineInfo, EngineRequest, EngineStats, Sampling
from serve_apps.engine.stream import Answer, TokenStream, check_request, check_room
from serve_apps.engine.wire import Frames, RankSpec, pack

CALL_TIMEOUT_S = 10.0
"""For what the rank's reader answers without computing."""
HEALTH_TIMEOUT_S = 20.0
END_TIMEOUT_S = 5.0
"""For a rank that was told to stop; then it is killed."""
RETRY_AFTER_S = 10
"""What a client is told while the replica is rebuilt."""
NO_STATS = {
    "running": 0,
    "waiting": 0,
    "cache_tokens_used": 0,
    "cache_tokens_total": 0,
    "prompt_tokens": 0,
    "generated_tokens": 0,
    "finished": 0,
    "aborted": 0,
}

log = logging.getLogger(__name__)


def default_host(config: Sharded) -> Callable[[RankSpec], Host]:
    """Return what starts a rank where ``config.host`` wants it."""
    return ProcessHost if config.host == "process" else ActorHost


class ShardedEngine(Engine):
    """One model over its ranks (here: one). ``spawn`` replaces how a rank is started."""

    def __init__(self, config: Sharded, spawn: Callable[[RankSpec], Host] | None = None) -> None:
        self._config = config
        self._spawn = spawn or default_host(config)
        self._name = "engine"
        self._info = EngineInfo(
            max_model_len=config.max_model_len,
            max_concurrent=config.max_concurrent,
            max_queued=config.max_queued,
            dtype=config.dtype,
            device=config.device,
            num_ranks=config.tensor_parallel,
            vocab_size=0,
        )
        self._host: Host | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lost: Exception | None = None
        self._stopping = False
        self._answers: dict[str, Answer] = {}
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_call = 0
        self._versions: set[str] = set()
        self._active: str | None = None
        self._idle = asyncio.Event()  # set whenever a request ends; waiters look again
        self._tasks: list[asyncio.Task[None]] = []
        self._heard_at = self._moved_at = self._token_at = 0.0
        self._step = -1
        self.rank_pid: int | None = None

    @property
    def info(self) -> EngineInfo:
        """What the config promises; what the model and the memory allow once one is loaded."""
        return self._info

    # Life

    async def start(self) -> EngineInfo:
        """Start rank 0 and wait until it says hello."""
        directory = tempfile.mkdtemp(prefix="rh-", dir="/tmp")  # short: a socket path has 107 bytes
        hello: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        try:
            path = f"{directory}/rank0"
            server = await asyncio.start_unix_server(
                lambda reader, writer: self._connected(reader, writer, hello), path
            )
            async with server:
                self._host = await asyncio.to_thread(self._spawn, self._spec(path))
                self._tasks.append(asyncio.create_task(self._watch_host(self._host, hello)))
                greeting = await asyncio.wait_for(hello, self._config.start_timeout_s)
        except TimeoutError:
            await self.stop()
            raise EngineError(
                f"rank 0 did not answer within {self._config.start_timeout_s:.0f} s "
                "(engine.start_timeout_s); its log says what it was doing"
            ) from None
        except BaseException:
            await self.stop()
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self.rank_pid = greeting["pid"]
        self._info = replace(self._info, device=greeting["device"])
        self._tasks.append(asyncio.create_task(self._watch_progress()))
        return self._info

    async def stop(self, drain_s: float = 0.0) -> None:
        """Finish what runs within ``drain_s``, then end the rank's process."""
        self._stopping = True
        await self._until_free(lambda a: True, drain_s)
        for answer in list(self._answers.values()):
            self._end(answer.request_id).push((), "abort")
        if self._host is not None:
            ended = asyncio.create_task(self._host.ended())
            with contextlib.suppress(EngineError, OSError):
                self._send({"t": "stop"})
            done, _ = await asyncio.wait([ended], timeout=END_TIMEOUT_S if self._writer else 0)
            if not done:
                self._host.kill()
                await asyncio.wait([ended], timeout=END_TIMEOUT_S)
            self._host.kill()  # an actor's process outlives its call
            self._host = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def _spec(self, path: str) -> RankSpec:
        import os

        c = self._config
        return RankSpec(
            engine=self._name,
            rank=0,
            num_ranks=c.tensor_parallel,
            socket=path,
            parent_pid=os.getpid(),
            device=c.device,
            dtype=c.dtype,
            max_model_len=c.max_model_len,
            max_concurrent=c.max_concurrent,
            max_batch_tokens=c.max_batch_tokens,
            cache_tokens=c.cache_tokens,
            threads=c.threads,
        )

    # Versions

    async def load(self, version: str, directory: str) -> None:
        """Have the rank read a version beside what it runs."""
        if version in self._versions:
            return
        told = await self._call(
            "load",
            self._config.start_timeout_s,
            version=version,
            directory=str(Path(directory).absolute()),
        )
        self._versions.add(version)
        self._info = replace(self._info, **told)

    async def activate(self, version: str) -> None:
        """Send new requests to ``version``."""
        self._refuse_if_down()
        self._refuse_unknown(version)
        self._active = version

    async def release(self, version: str, drain_s: float) -> None:
        """Take no more requests for the version, wait for its last, free its weights."""
        if version == self._active:
            raise EngineError(f"{version} is active; activate another version first")
        self._refuse_unknown(version)
        self._versions.remove(version)
        await self._until_free(lambda a: a.version == version, drain_s)
        for answer in [a for a in self._answers.values() if a.version == version]:
            await self.abort(answer.request_id)
        await self._call("release", CALL_TIMEOUT_S + self._config.start_timeout_s, version=version)

    # Requests

    def generate(self, request: EngineRequest, version: str | None = None) -> TokenStream:
        """Check, admit and send one request; see the contract."""
        self._refuse_if_down()
        check_request(request, self._info)
        check_room(len(self._answers), self._info)
        return self._admit(request, version)

    async def abort(self, request_id: str) -> None:
        """End a request from elsewhere."""
        if request_id in self._answers:
            answer = self._end(request_id)
            answer.push((), "abort")
            self._send({"t": "abort", "id": request_id})

    async def check_health(self) -> None:
        """Be satisfied with a token that just left the rank, else ask it for one."""
        if self._lost:
            raise self._lost
        bound = min(HEALTH_TIMEOUT_S, self._config.step_timeout_s)
        if self._active is None:
            await self._call("stats", bound)
            return
        asked_at = time.monotonic()
        if self._answers and asked_at - self._token_at < 1.0:
            return  # it generates right now; a probe would only wait behind the others
        probe = EngineRequest(f"health-{asked_at}", (0,), 1, Sampling(temperature=0.0))
        stream = self._admit(probe, None)
        try:
            async with asyncio.timeout(bound):
                async for chunk in stream:
                    if chunk.finish == "error":
                        raise EngineError(f"the health probe failed: {chunk.error}")
        except TimeoutError:
            await stream.aclose()
            if self._token_at < asked_at:
                raise EngineError(f"no token within {bound:.0f} s") from None

    async def stats(self) -> EngineStats:
        """Ask the rank for its counters."""
        counted = NO_STATS | (await self._call("stats", CALL_TIMEOUT_S))
        return EngineStats(**counted, versions=tuple(sorted(self._versions)), active=self._active)

    def _admit(self, request: EngineRequest, version: str | None) -> TokenStream:
        version = version or self._active
        if version is None:
            raise RequestError("no version is active yet", 503, "engine_unavailable", None, 1)
        if version not in self._versions:
            raise RequestError(f"{version} is not loaded", 404, "model_not_found", "model")
        if request.request_id in self._answers:
            raise RequestError(f"request id {request.request_id} is in use", 409, "conflict")
        answer, s = Answer(request, version), request.sampling
        self._send(
            {
                "t": "admit",
                "id": request.request_id,
                "version": version,
                "prompt": request.prompt_ids,
                "max_tokens": request.max_tokens,
                "sampling": (s.temperature, s.top_p, s.top_k, _unsigned(s.seed)),
                "stop": request.stop_ids,
            }
        )
        if not self._answers:
            self._moved_at = time.monotonic()  # from now on the rank owes us steps
        self._answers[request.request_id] = answer
        return TokenStream(answer, self._closed)

    def _closed(self, request_id: str) -> None:
        if request_id in self._answers:
            self._end(request_id)
            with contextlib.suppress(EngineError):  # a lost rank holds nothing to abort
                self._send({"t": "abort", "id": request_id})

    def _end(self, request_id: str) -> Answer:
        answer = self._answers.pop(request_id)
        self._idle.set()
        return answer

    async def _until_free(self, mine: Callable[[Answer], bool], drain_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while any(mine(a) for a in self._answers.values()):
                    self._idle.clear()
                    await self._idle.wait()

    # The rank

    async def _connected(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        hello: asyncio.Future[dict[str, Any]],
    ) -> None:
        if self._writer is not None:
            writer.close()  # one rank, one connection
            return
        self._writer, frames = writer, Frames()
        why = "closed its connection"
        try:
            while data := await reader.read(1 << 16):
                self._heard_at = time.monotonic()
                for message in frames.feed(data):
                    if message["t"] == "hello" and not hello.done():
                        hello.set_result(message)
                    else:
                        self._handle(message)
        except (EngineError, OSError) as error:
            why = f"broke the connection: {error}"
        self._lose(why)

    def _handle(self, message: dict[str, Any]) -> None:
        match message["t"]:
            case "step":
                self._progress(message["n"])
                for request_id, ids, finish, error in message["out"]:
                    self._token_at = self._heard_at
                    if request_id not in self._answers:
                        continue  # aborted here while the rank computed
                    answer = self._end(request_id) if finish else self._answers[request_id]
                    answer.push(tuple(ids), finish, error)
            case "beat":
                self._progress(message["n"])
            case "reply":
                future = self._calls.pop(message["call"], None)
                if future is None or future.done():
                    return
                if "error" in message:
                    kind, text = message["error"]
                    future.set_exception(_error(kind, text))
                else:
                    future.set_result(message["result"])

    def _progress(self, step: int) -> None:
        if step != self._step:
            self._step, self._moved_at = step, self._heard_at

    async def _call(self, kind: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        self._next_call += 1
        call = self._next_call
        self._calls[call] = future = asyncio.get_running_loop().create_future()
        try:
            self._send({"t": kind, "call": call, **fields})
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise EngineError(f"rank 0 did not answer {kind!r} within {timeout_s:.0f} s") from None
        finally:
            self._calls.pop(call, None)

    def _send(self, message: dict[str, Any]) -> None:
        if self._lost:
            raise self._lost
        if self._writer is None:
            raise EngineError("the engine is not running")
        self._writer.write(pack(message))

    async def _watch_host(self, host: Host, hello: asyncio.Future[dict[str, Any]]) -> None:
        why = await host.ended()
        if not hello.done():
            hello.set_exception(EngineError(f"rank 0 {why} before it was ready; see its log"))
        self._lose(why)

    async def _watch_progress(self) -> None:
        bound, look_s = self._config.step_timeout_s, min(1.0, self._config.step_timeout_s / 4)
        now = time.monotonic()
        while True:
            slept_at = now
            await asyncio.sleep(look_s)
            now = time.monotonic()
            if now - slept_at > look_s + 0.5:
                continue  # this loop was held up, so what the rank said may still lie unread
            # Silence is a stopped process; beats without steps are a loop that hangs.
            if now - self._heard_at > max(bound, 5.0) or (
                self._answers and now - self._moved_at > bound
            ):
                self._lose(f"made no step for {bound:.0f} s (engine.step_timeout_s)")
                return

    def _lose(self, why: str) -> None:
        """Fail all that waits, once; the replica is rebuilt by whoever sees the health check."""
        if self._lost or self._stopping:
            return
        self._lost = RankLost(0, self._name, why)
        log.error("%s", self._lost)
        if self._host is not None:
            self._host.kill()
        for request_id in list(self._answers):
            self._end(request_id).fail(self._lost)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._lost)

    def _refuse_if_down(self) -> None:
        if self._lost or self._stopping or self._writer is None:
            why = str(self._lost) if self._lost else "the engine is not running"
            raise RequestError(why, 503, "engine_unavailable", None, RETRY_AFTER_S)

    def _refuse_unknown(self, version: str) -> None:
        if version not in self._versions:
            raise EngineError(f"{version} is not loaded; loaded: {sorted(self._versions)}")


def _unsigned(seed: int | None) -> int | None:
    """Fold any integer into the 64 bits that msgpack carries and the generator takes."""
    return None if seed is None else seed & (2**64 - 1)


def _error(kind: str, text: str) -> Exception:
    known = {"EngineError", "NotEnough", "ConfigError", "Corrupt"}
    made: Exception = getattr(errors, kind if kind in known else "EngineError")(text)
    return made
