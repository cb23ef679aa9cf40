"""The processes of one engine, seen from the front: started, heard and lost together.

Each rank connects to one local socket and beats once a second, outside of any collective. One
that ends, falls silent or makes no step takes all others with it: a part of a model is no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster import errors
from cluster.errors import EngineError, RankLost
from serve_apps.config import Sharded
from serve_apps.engine.hosts import Host
from serve_apps.engine.wire import Frames, PeerFailed, RankSpec, pack

END_TIMEOUT_S = 5.0
"""For ranks that were told to stop; then they are killed."""
SILENCE_S = 5.0
"""Heartbeats come each second; a load may hold them up for some."""

Message = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Link:
    """One rank's process and its connection."""

    host: Host | None = None
    writer: asyncio.StreamWriter | None = None
    pid: int = 0
    device: str = ""
    heard_at: float = 0.0
    hello: asyncio.Event = field(default_factory=asyncio.Event)


class Ranks:
    """``start`` first; ``send`` and ``call`` while none is lost; ``stop`` at the end."""

    def __init__(
        self,
        config: Sharded,
        name: str,
        spawn: Callable[[RankSpec], Host],
        hear: Callable[[Message], None],
        waiting: Callable[[], bool],
        lose: Callable[[Exception], None],
    ) -> None:
        """``hear`` takes steps of rank 0, ``waiting`` says whether one is owed.

        ``lose`` is told once, when a rank is gone.
        """
        self._config, self._name, self._spawn = config, name, spawn
        self._hear, self._waiting, self._lose = hear, waiting, lose
        self.links = [Link() for _ in range(config.tensor_parallel)]
        self.lost: Exception | None = None
        self._stopping = False
        self._calls: dict[tuple[int, int], asyncio.Future[Message]] = {}
        self._next_call = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._directory = ""
        self._step = -1
        self.moved_at = 0.0

    @property
    def up(self) -> bool:
        """Whether all ranks are connected and none is lost."""
        return not self.lost and not self._stopping and all(link.writer for link in self.links)

    # Life

    async def start(self) -> None:
        """Start all ranks and wait until each says hello; EngineError names those that do not."""
        self._directory = tempfile.mkdtemp(prefix="rh-", dir="/tmp")  # a socket path has 107 bytes
        bound = self._config.start_timeout_s
        server = await asyncio.start_unix_server(self._connected, f"{self._directory}/front")
        async with server:
            for rank, link in enumerate(self.links):
                link.host = await asyncio.to_thread(self._spawn, self._spec(rank))
                self._tasks.append(asyncio.create_task(self._watch_host(rank, link.host)))
            try:
                async with asyncio.timeout(bound):
                    for link in self.links:
                        await link.hello.wait()
            except TimeoutError:
                silent = [str(n) for n, link in enumerate(self.links) if not link.hello.is_set()]
                raise EngineError(
                    f"rank {', '.join(silent)} did not answer within {bound:.0f} s "
                    "(engine.start_timeout_s); its log says what it was doing"
                ) from None
        if self.lost:
            raise EngineError(f"{self.lost}, before the engine was ready; see its log")
        self._tasks.append(asyncio.create_task(self._watch_progress()))

    async def stop(self) -> None:
        """Tell the ranks to stop, and end those that do not."""
        self._stopping = True
        hosts = [link.host for link in self.links if link.host is not None]
        ended = [asyncio.create_task(host.ended()) for host in hosts]
        if self.links[0].writer is not None:
            with contextlib.suppress(EngineError, OSError):
                self.send({"t": "stop"})  # rank 0 tells the others
            if ended:
                await asyncio.wait(ended, timeout=END_TIMEOUT_S)
        for host in hosts:
            host.kill()  # also where the process has ended: an actor outlives its call
        if ended:
            await asyncio.wait(ended, timeout=END_TIMEOUT_S)
        for link in self.links:
            if link.writer is not None:
                link.writer.close()
            link.host = link.writer = None
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineError("the engine was stopped"))
        for task in [*self._tasks, *ended]:
            task.cancel()
        await asyncio.gather(*self._tasks, *ended, return_exceptions=True)
        self._tasks.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _spec(self, rank: int) -> RankSpec:
        c = self._config
        return RankSpec(
            engine=self._name,
            rank=rank,
            num_ranks=c.tensor_parallel,
            # an actor sees its own GPU alone, a plain process sees all of them
            local_device=rank if c.host == "process" else 0,
            socket=f"{self._directory}/front",
            store=f"{self._directory}/store",
            parent_pid=os.getpid(),
            device=c.device,
            dtype=c.dtype,
            max_model_len=c.max_model_len,
            max_concurrent=c.max_concurrent,
            max_batch_tokens=c.max_batch_tokens,
            cache_tokens=c.cache_tokens,
            prefix_cache=c.prefix_cache,
            prompt_lookup=c.prompt_lookup,
            quantization=c.quantization,
            weights=c.weights,
            threads=c.threads,
            start_timeout_s=c.start_timeout_s,
            step_timeout_s=c.step_timeout_s,
        )

    # Talking

    def send(self, message: Message, rank: int = 0) -> None:
        """Write one message to a rank; what was lost raises its RankLost."""
        if self.lost:
            raise self.lost
        writer = self.links[rank].writer
        if writer is None:
            raise EngineError("the engine is not running")
        writer.write(pack(message))

    async def call(self, kind: str, timeout_s: float, **fields: Any) -> Message:
        """Ask rank 0 and return its answer; EngineError when none comes in time."""
        return (await self._ask([0], kind, timeout_s, fields))[0]

    async def call_all(self, kind: str, timeout_s: float, **fields: Any) -> list[Message]:
        """Ask every rank; when one of them fails, raise its reason once all have answered."""
        return await self._ask(range(len(self.links)), kind, timeout_s, fields)

    async def _ask(
        self, ranks: Sequence[int], kind: str, timeout_s: float, fields: Message
    ) -> list[Message]:
        self._next_call += 1
        number, loop = self._next_call, asyncio.get_running_loop()
        futures = {rank: loop.create_future() for rank in ranks}
        for rank, future in futures.items():
            self._calls[rank, number] = future
        try:
            for rank in ranks:
                self.send({"t": kind, "call": number, **fields}, rank)
            done, late = await asyncio.wait(futures.values(), timeout=timeout_s)
            if late:
                silent = ", ".join(str(r) for r, f in futures.items() if f in late)
                raise EngineError(f"rank {silent} did not answer {kind!r} within {timeout_s:.0f} s")
            failed = [e for future in futures.values() if (e := future.exception())]
            # those that only heard of it know no reason
            own = [e for e in failed if not isinstance(e, PeerFailed)]
            if failed:
                raise (own or failed)[0]
            return [future.result() for future in futures.values()]
        finally:
            for rank, future in futures.items():
                self._calls.pop((rank, number), None)
                future.cancel()

    # Hearing

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames, rank = Frames(), -1
        why = "closed its connection"
        try:
            while data := await reader.read(1 << 16):
                now = time.monotonic()
                for message in frames.feed(data):
                    if rank < 0:
                        rank = self._greet(message, writer)
                    else:
                        self._handle(rank, message, now)
                self.links[rank].heard_at = now
        except (EngineError, OSError) as error:
            why = f"broke the connection: {error}"
        if rank < 0:
            writer.close()
        else:
            self._gone(rank, why)

    def _greet(self, message: Message, writer: asyncio.StreamWriter) -> int:
        rank: int = message.get("rank", -1) if message["t"] == "hello" else -1
        if not 0 <= rank < len(self.links) or self.links[rank].writer is not None:
            raise EngineError("a stranger connected")  # one rank, one connection
        link = self.links[rank]
        link.writer, link.pid, link.device = writer, message["pid"], message["device"]
        link.hello.set()
        return rank

    def _handle(self, rank: int, message: Message, now: float) -> None:
        kind = message["t"]
        if kind in ("step", "beat"):
            if rank == 0 and message["n"] != self._step:
                self._step, self.moved_at = message["n"], now
            if kind == "step":
                self._hear(message)
        elif kind == "reply":
            future = self._calls.pop((rank, message["call"]), None)
            if future is None or future.done():
                return
            if "error" in message:
                future.set_exception(_error(*message["error"]))
            else:
                future.set_result(message["result"])

    # Losing

    async def _watch_host(self, rank: int, host: Host) -> None:
        self._gone(rank, await host.ended())

    async def _watch_progress(self) -> None:
        bound = self._config.step_timeout_s
        look_s = min(1.0, bound / 4)
        now = time.monotonic()
        while True:
            slept_at = now
            await asyncio.sleep(look_s)
            now = time.monotonic()
            if now - slept_at > look_s + 0.5:
                continue  # this loop was held up, so what the ranks said may still lie unread
            # Silence is a stopped process; beats without steps are a loop that hangs.
            for rank, link in enumerate(self.links):
                if now - link.heard_at > max(bound, SILENCE_S):
                    self._gone(rank, f"was silent for {max(bound, SILENCE_S):.0f} s")
                    return
            if self._waiting() and now - self.moved_at > bound:
                self._gone(0, f"made no step for {bound:.0f} s (engine.step_timeout_s)")
                return

    def _gone(self, rank: int, why: str) -> None:
        """Fail all that waits, once, and end the other ranks."""
        if self.lost or self._stopping:
            return
        self.lost = RankLost(rank, self._name, why)
        log.error("%s", self.lost)
        for link in self.links:
            link.hello.set()
            if link.host is not None:
                link.host.kill()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self.lost)
        self._lose(self.lost)


def _error(kind: str, text: str) -> Exception:
    if kind == PeerFailed.__name__:
        return PeerFailed(text)
    known = {"EngineError", "NotEnough", "ConfigError", "Corrupt"}
    made: Exception = getattr(errors, kind if kind in known else "EngineError")(text)
    return made
