"""The front of our engine: lives in the replica's event loop, and never imports torch.

It checks and admits requests, hands them to rank 0, and passes each step's tokens to whom they
belong. What the ranks know better (blocks, steps, weights) stays there; how they live and die is
`ranks.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.errors import EngineError, RequestError
from serve_apps.config import Sharded
from serve_apps.engine.hosts import ActorHost, Host, ProcessHost
from serve_apps.engine.interface import Engine, EngineInfo, EngineRequest, EngineStats, Sampling
from serve_apps.engine.ranks import Message, Ranks
from serve_apps.engine.stream import Answer, TokenStream, check_request, check_room
from serve_apps.engine.wire import RankSpec, Told, pack_request

CALL_TIMEOUT_S = 10.0
"""For what the rank's reader answers without computing."""
HEALTH_TIMEOUT_S = 20.0
RETRY_AFTER_S = 10
"""What a client is told while the replica is rebuilt."""
FIRST = -(2**62)
"""The priority of a health probe: it goes before all that wait."""
NO_STATS = {
    "running": 0,
    "waiting": 0,
    "cache_tokens_used": 0,
    "cache_tokens_total": 0,
    "prompt_tokens": 0,
    "generated_tokens": 0,
    "finished": 0,
    "aborted": 0,
    "cached_prompt_tokens": 0,
    "preemptions": 0,
    "expired": 0,
    "guessed": 0,
    "guessed_right": 0,
}


def default_host(config: Sharded) -> Callable[[RankSpec], Host]:
    """Return what starts a rank where ``config.host`` wants it."""
    return ProcessHost if config.host == "process" else ActorHost


class ShardedEngine(Engine):
    """One model over its ranks. ``spawn`` replaces how a rank is started."""

    def __init__(self, config: Sharded, spawn: Callable[[RankSpec], Host] | None = None) -> None:
        self._config = config
        self._ranks = Ranks(
            config,
            "engine",
            spawn or default_host(config),
            hear=self._step,
            waiting=lambda: bool(self._answers),
            lose=self._lose,
        )
        self._info = EngineInfo(
            max_model_len=config.max_model_len,
            max_concurrent=config.max_concurrent,
            max_queued=config.max_queued,
            dtype=config.dtype,
            device=config.device,
            num_ranks=config.tensor_parallel,
            vocab_size=0,
        )
        self._stopping = False
        self._answers: dict[str, Answer] = {}
        self._versions: set[str] = set()
        self._adapters: dict[str, str] = {}  # each one's base
        self._live: set[str] = set()  # those from the shelf: a run's, beside what is configured
        self.weight_bytes: dict[str, list[int]] = {}
        """Of each loaded version, what each rank holds of it."""
        self._active: str | None = None
        self._idle = asyncio.Event()  # set whenever a request ends; waiters look again
        self._token_at = 0.0

    @property
    def info(self) -> EngineInfo:
        """What the config promises; what the model and the memory allow once one is loaded."""
        return self._info

    @property
    def rank_pids(self) -> list[int]:
        """Process ids of the ranks, in their order; 0 before they have said hello."""
        return [link.pid for link in self._ranks.links]

    # Life

    async def start(self) -> EngineInfo:
        """Start the ranks and wait until each says hello."""
        try:
            await self._ranks.start()
        except BaseException:
            await self.stop()
            raise
        self._info = replace(self._info, device=self._ranks.links[0].device)
        return self._info

    async def stop(self, drain_s: float = 0.0) -> None:
        """Finish what runs within ``drain_s``, then end the ranks' processes."""
        self._stopping = True
        await self._until_free(lambda a: True, drain_s)
        for answer in list(self._answers.values()):
            self._end(answer.request_id).push((), "abort")
        await self._ranks.stop()

    # Versions

    async def load(self, version: str, directory: str, holder: str | None = None) -> None:
        """Have every rank read its share of a version, beside what it runs."""
        if version in self._versions:
            return
        told = await self._ranks.call_all(
            "load",
            self._config.start_timeout_s,
            version=version,
            directory=str(Path(directory).absolute()),
            holder=holder,
        )
        self._versions.add(version)
        self.weight_bytes[version] = [rank.pop("weight_bytes", 0) for rank in told]
        self._info = replace(self._info, **told[0])

    async def activate(self, version: str) -> None:
        """Send new requests to ``version``."""
        self._refuse_if_down()
        self._refuse_unknown(self._adapters.get(version, version))
        self._active = version

    async def release(self, version: str, drain_s: float) -> None:
        """Take no more requests for the version, wait for its last, free its weights."""
        if version == self._active:
            raise EngineError(f"{version} is active; activate another version first")
        self._refuse_unknown(version)
        for adapter in [a for a, base in self._adapters.items() if base == version]:
            await self.release_adapter(adapter, drain_s)
        self._versions.remove(version)
        self.weight_bytes.pop(version)
        await self._until_free(lambda a: a.version == version, drain_s)
        for answer in [a for a in self._answers.values() if a.version == version]:
            await self.abort(answer.request_id)
        bound = CALL_TIMEOUT_S + self._config.start_timeout_s
        await self._ranks.call("release", bound, version=version)

    async def move(self, source: str, target: str) -> int:
        """Compute on ``target`` what has no token from ``source`` yet; return how many requests."""
        self._refuse_unknown(self._adapters.get(target, target))
        ends = {"source": self._weights_of(source), "target": self._weights_of(target)}
        told = await self._ranks.call("move", CALL_TIMEOUT_S, **ends)
        return int(told["moved"])

    def _weights_of(self, version: str) -> tuple[str, str]:
        """Return the version whose weights are computed, and what is added to them."""
        base = self._adapters.get(version)
        return (base, version) if base else (version, "")

    # Adapters

    async def load_adapter(
        self, adapter: str, base: str, directory: str, holder: str | None = None
    ) -> None:
        """Have every rank read an adapter beside the version that it adds to."""
        if self._adapters.get(adapter) == base:
            return
        self._refuse_unknown(base)
        held = [one for one in self._adapters if one not in self._live]
        if holder is None and adapter not in held and len(held) >= self._config.max_adapters:
            raise EngineError(
                f"adapter {adapter}: {len(held)} adapters are held already "
                "(engine.max_adapters); release one, or raise that"
            )
        told = await self._ranks.call_all(
            "adapt",
            self._config.start_timeout_s,
            adapter=adapter,
            base=base,
            directory=str(Path(directory).absolute()),
            holder=holder,
            max_rank=self._config.max_lora_rank,
        )
        self._refuse_unknown(base)  # it may have been released meanwhile
        self._adapters[adapter] = base
        if holder is not None:
            self._live.add(adapter)
        self.weight_bytes[adapter] = [rank["weight_bytes"] for rank in told]

    async def release_adapter(self, adapter: str, drain_s: float) -> None:
        """Take no more requests for the adapter, wait for its last, free it."""
        if adapter not in self._adapters:
            raise EngineError(f"{adapter} is not loaded; loaded: {sorted(self._adapters)}")
        base = self._adapters.pop(adapter)
        self._live.discard(adapter)
        self.weight_bytes.pop(adapter)
        await self._until_free(lambda a: a.version == adapter, drain_s)
        for answer in [a for a in self._answers.values() if a.version == adapter]:
            await self.abort(answer.request_id)
        bound = CALL_TIMEOUT_S + self._config.start_timeout_s
        await self._ranks.call("release", bound, version=base, adapter=adapter)

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
            self._ranks.send({"t": "abort", "id": request_id})

    async def check_health(self) -> None:
        """Be satisfied with a token that just left the ranks, else ask them for one."""
        if self._ranks.lost:
            raise self._ranks.lost
        bound = min(HEALTH_TIMEOUT_S, self._config.step_timeout_s)
        if self._active is None:
            await self._ranks.call("stats", bound)
            return
        asked_at = time.monotonic()
        if self._answers and asked_at - self._token_at < 1.0:
            return  # it generates right now; a probe would only wait behind the others
        rules = Sampling(temperature=0.0)
        probe = EngineRequest(f"health-{asked_at}", (0,), 1, rules, priority=FIRST)
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
        """Ask rank 0 for its counters."""
        counted = NO_STATS | (await self._ranks.call("stats", CALL_TIMEOUT_S))
        return EngineStats(
            **counted,
            versions=tuple(sorted(self._versions)),
            active=self._active,
            adapters=tuple(sorted(self._adapters)),
        )

    def _admit(self, request: EngineRequest, version: str | None) -> TokenStream:
        version = version or self._active
        if version is None:
            raise RequestError("no version is active yet", 503, "engine_unavailable", None, 1)
        base = self._adapters.get(version)
        if base is None and version not in self._versions:
            raise RequestError(f"{version} is not loaded", 404, "model_not_found", "model")
        if request.request_id in self._answers:
            raise RequestError(f"request id {request.request_id} is in use", 409, "conflict")
        answer = Answer(request, version)
        self._ranks.send(pack_request(request, base or version, version if base else ""))
        if not self._answers:
            self._ranks.moved_at = time.monotonic()  # from now on the ranks owe us steps
        self._answers[request.request_id] = answer
        return TokenStream(answer, self._closed)

    def _closed(self, request_id: str) -> None:
        if request_id in self._answers:
            self._end(request_id)
            with contextlib.suppress(EngineError):  # a lost rank holds nothing to abort
                self._ranks.send({"t": "abort", "id": request_id})

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

    # What the ranks say

    def _step(self, message: Message) -> None:
        self._token_at = time.monotonic()
        for said in message["out"]:
            told = Told.unpack(said)
            if told.request_id not in self._answers:
                continue  # aborted here while the ranks computed
            answer = self._end(told.request_id) if told.finish else self._answers[told.request_id]
            answer.push(told.token_ids, told.finish, told.error, told.logprobs, told.prompt)
        for request_id in message.get("moved", ()):
            if request_id in self._answers:
                self._answers[request_id].version = message["to"]
                self._idle.set()  # what waits for the other version to be free looks again
        for request_id in message.get("expired", ()):
            if request_id in self._answers:
                self._end(request_id).fail(_too_late())

    def _lose(self, lost: Exception) -> None:
        """Fail all that waits; the replica is rebuilt by whoever sees the health check."""
        for request_id in list(self._answers):
            self._end(request_id).fail(lost)

    def _refuse_if_down(self) -> None:
        if self._stopping or not self._ranks.up:
            why = str(self._ranks.lost or "the engine is not running")
            raise RequestError(why, 503, "engine_unavailable", None, RETRY_AFTER_S)

    def _refuse_unknown(self, version: str) -> None:
        if version not in self._versions:
            raise EngineError(f"{version} is not loaded; loaded: {sorted(self._versions)}")


def _too_late() -> RequestError:
    return RequestError(
        "the request waited past its deadline and was not started; try again later",
        504,
        "deadline_exceeded",
        retry_after_s=RETRY_AFTER_S,
    )
