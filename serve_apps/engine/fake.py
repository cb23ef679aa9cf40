"""An engine without a model: the whole contract in one process, with faults on order."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import EngineError, RankLost, RequestError
from serve_apps.config import Fake
from serve_apps.engine.interface import (
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    Logprob,
    PromptInfo,
)
from serve_apps.engine.stream import Answer, TokenStream, check_request, check_room

VOCAB_SIZE = 256
FAULTS = "fake.json"
FIRST_ID = 32  # below lie the control tokens of the usual tokenizers


def fake_token(prompt_ids: Sequence[int], version: str, position: int) -> int:
    """Return the token after ``position`` answer tokens: a hash of what the answer depends on."""
    key = f"{version}|{','.join(map(str, prompt_ids))}|{position}".encode()
    return FIRST_ID + zlib.crc32(key) % (VOCAB_SIZE - FIRST_ID)


def fake_logprob(token_id: int, top: int) -> Logprob:
    """Return made-up log-probabilities: the token itself first, then its followers."""
    likely = (((token_id + k) % VOCAB_SIZE, -0.25 * (k + 1)) for k in range(top))
    return Logprob(token_id, -0.25, tuple(likely))


def _with_faults(config: Fake, path: Path) -> Fake:
    try:
        return Fake.model_validate(config.model_dump() | json.loads(path.read_bytes()))
    except ValueError as error:
        raise EngineError(f"{path.name}: {error}; its keys are the fake engine's own") from None


@dataclass(slots=True)
class _Held:
    answer: Answer
    request: EngineRequest
    task: asyncio.Task[None] | None = None
    running: bool = False
    generated: int = 0
    admitted: float = 0.0
    prompt: PromptInfo | None = None


class FakeEngine(Engine):
    """Deterministic tokens; delay, failure and hang at the k-th token as the config says.

    ``says`` replaces the hash by fixed ids, the same for every prompt and repeated to
    ``max_tokens``. ``kill()`` plays a dead rank; ``bad_loads`` names versions that do not load.
    A version whose files hold a ``fake.json`` has the delay and the failures that stand there.
    """

    def __init__(self, config: Fake, says: Sequence[int] | None = None) -> None:
        self._config, self._says = config, tuple(says or ())
        self.bad_loads: set[str] = set()
        self._versions: dict[str, str] = {}
        self._faults: dict[str, Fake] = {}
        self._adapters: dict[str, str] = {}
        self._live: set[str] = set()  # adapters of the shelf: they take no place of the library's
        self._active: str | None = None
        self._held: dict[str, _Held] = {}
        self._last_prompt: dict[tuple[str, str], tuple[int, ...]] = {}
        self._started, self._lost = False, False
        self._prompt_tokens = self._generated = self._finished = self._aborted = 0

    @property
    def info(self) -> EngineInfo:
        """What the config says; the vocabulary is 256 ids, used from 32 up."""
        c = self._config
        return EngineInfo(
            max_model_len=c.max_model_len,
            max_concurrent=c.max_concurrent,
            max_queued=c.max_queued,
            dtype="float32",
            device="cpu",
            num_ranks=1,
            vocab_size=0,  # any tokenizer may stand above it
        )

    async def start(self) -> EngineInfo:
        """Be ready at once."""
        self._started = True
        return self.info

    async def load(self, version: str, directory: str, holder: str | None = None) -> None:
        """Remember the version; of its files ``fake.json`` alone is read, if there is one."""
        self._alive()
        if version in self.bad_loads:
            raise EngineError(f"{version} cannot be loaded: it is one of bad_loads")
        if (own := Path(directory, FAULTS)).exists():
            self._faults[version] = _with_faults(self._config, own)
        self._versions[version] = directory

    async def activate(self, version: str) -> None:
        """Send new requests to ``version``."""
        self._alive()
        if self._adapters.get(version, version) not in self._versions:
            raise EngineError(f"{version} is not loaded; loaded: {sorted(self._versions)}")
        self._active = version

    async def release(self, version: str, drain_s: float) -> None:
        """Wait for the version's requests, abort the rest, forget the version."""
        if version == self._active:
            raise EngineError(f"{version} is active; activate another version first")
        if version not in self._versions:
            raise EngineError(f"{version} is not loaded; loaded: {sorted(self._versions)}")
        for adapter in [a for a, base in self._adapters.items() if base == version]:
            await self.release_adapter(adapter, drain_s)
        del self._versions[version]
        await self._drain(version, drain_s)
        self._faults.pop(version, None)

    async def move(self, source: str, target: str) -> int:
        """Give what has no token yet to ``target``."""
        self._alive()
        if self._adapters.get(target, target) not in self._versions:
            raise EngineError(f"{target} is not loaded; loaded: {sorted(self._versions)}")
        moved = 0
        for held in self._held.values():
            fresh = held.generated == 0 and not held.request.pinned
            if held.answer.version == source and fresh:
                held.answer.version = target
                moved += 1
        return moved

    async def load_adapter(
        self, adapter: str, base: str, directory: str, holder: str | None = None
    ) -> None:
        """Remember the adapter; nothing is read."""
        self._alive()
        if base not in self._versions:
            raise EngineError(f"{base} is not loaded; loaded: {sorted(self._versions)}")
        if adapter in self.bad_loads:
            raise EngineError(f"adapter {adapter} cannot be served: it is one of bad_loads")
        counted = [one for one in self._adapters if one not in self._live]
        if holder is None and adapter not in counted and len(counted) >= self._config.max_adapters:
            raise EngineError(f"{len(counted)} adapters are held already")
        self._adapters[adapter] = base
        if holder is not None:
            self._live.add(adapter)

    async def release_adapter(self, adapter: str, drain_s: float) -> None:
        """Wait for the adapter's requests, abort the rest, forget the adapter."""
        if adapter not in self._adapters:
            raise EngineError(f"{adapter} is not loaded; loaded: {sorted(self._adapters)}")
        del self._adapters[adapter]
        self._live.discard(adapter)
        await self._drain(adapter, drain_s)

    async def _drain(self, version: str, drain_s: float) -> None:
        until = time.monotonic() + drain_s
        while any(h.answer.version == version for h in self._held.values()):
            left = until - time.monotonic()
            tasks = [h.task for h in self._held.values() if h.task]  # whichever makes room
            if left <= 0 or not tasks:
                break
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for held in [h for h in self._held.values() if h.answer.version == version]:
            self._end(held, "abort")

    def generate(self, request: EngineRequest, version: str | None = None) -> TokenStream:
        """Stream ``fake_token`` of the prompt and the version, one token a chunk."""
        self._alive()
        version = version or self._active
        if version is None:
            raise RequestError("no version is active yet", 503, "engine_unavailable", None, 1)
        if version not in self._versions and version not in self._adapters:
            raise RequestError(f"{version} is not loaded", 404, "model_not_found", "model")
        if request.request_id in self._held:
            raise RequestError(f"request id {request.request_id} is in use", 409, "conflict")
        check_request(request, self.info)
        check_room(len(self._held), self.info)
        held = _Held(Answer(request, version), request, admitted=time.monotonic())
        self._held[request.request_id] = held
        self._admit()
        return TokenStream(held.answer, self._closed)

    async def abort(self, request_id: str) -> None:
        """End a request from elsewhere."""
        if held := self._held.get(request_id):
            self._end(held, "abort")

    async def check_health(self) -> None:
        """Raise when killed, or when the first token would hang."""
        self._alive()
        if self._config.hang_at_token == 1:
            raise EngineError("no token within the bound: the engine hangs at its first token")

    async def stats(self) -> EngineStats:
        """Return what the tables say."""
        running = [h for h in self._held.values() if h.running]
        return EngineStats(
            running=len(running),
            waiting=len(self._held) - len(running),
            cache_tokens_used=sum(len(h.request.prompt_ids) for h in running),
            cache_tokens_total=self._config.max_concurrent * self._config.max_model_len,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            finished=self._finished,
            aborted=self._aborted,
            versions=tuple(sorted(self._versions)),
            active=self._active,
            adapters=tuple(sorted(self._adapters)),
        )

    async def stop(self, drain_s: float = 0.0) -> None:
        """Finish what runs within ``drain_s``, abort the rest."""
        self._started = False
        tasks = [h.task for h in self._held.values() if h.task]
        if tasks and drain_s:
            await asyncio.wait(tasks, timeout=drain_s)
        for held in list(self._held.values()):
            self._end(held, "abort")

    def kill(self) -> None:
        """Play a rank that died: every reader gets RankLost, health fails, the door is shut."""
        self._lost = True
        for held in list(self._held.values()):
            self._forget(held)
            held.answer.fail(RankLost(0, "fake", "died"))

    def _alive(self) -> None:
        if self._lost:
            raise RequestError("the engine lost a rank", 503, "engine_unavailable", None, 5)
        if not self._started:
            raise RequestError("the engine is not running", 503, "engine_unavailable", None, 5)

    def _admit(self) -> None:
        free = self._config.max_concurrent - sum(h.running for h in self._held.values())
        for held in [h for h in self._held.values() if not h.running][:free]:
            held.running = True
            held.prompt = self._prompt_info(held)
            self._prompt_tokens += len(held.request.prompt_ids)
            held.task = asyncio.create_task(self._run(held))

    def _prompt_info(self, held: _Held) -> PromptInfo:
        """Count as cached what the prompt shares with the last one of its version and salt."""
        request, waited = held.request, time.monotonic() - held.admitted
        ids, key = request.prompt_ids, (held.answer.version, request.salt)
        before, cached = self._last_prompt.get(key, ()), 0
        while cached < min(len(ids) - 1, len(before)) and ids[cached] == before[cached]:
            cached += 1
        self._last_prompt[key] = ids
        top = request.sampling.prompt_logprobs
        scored = () if top is None else tuple(fake_logprob(one, top) for one in ids[1:])
        return PromptInfo(cached, waited, scored)

    async def _run(self, held: _Held) -> None:
        request = held.request
        config = self._faults.get(held.answer.version, self._config)
        if request.max_tokens == 0:
            await asyncio.sleep(config.token_delay_s)
            return self._end(held, "length")
        for k in range(1, request.max_tokens + 1):
            await asyncio.sleep(config.token_delay_s)
            if k == config.hang_at_token:
                await asyncio.Event().wait()  # until the request is aborted or the engine stops
            if k == config.fail_at_token:
                return self._end(held, "error", error="the engine failed at this token, as told")
            token = (
                self._says[(k - 1) % len(self._says)]
                if self._says
                else fake_token(request.prompt_ids, held.answer.version, k - 1)
            )
            self._generated += 1
            held.generated += 1
            if token in request.stop_ids and k <= request.sampling.min_tokens:
                token = FIRST_ID
            if token in request.stop_ids:
                return self._end(held, "stop")
            if k == request.max_tokens:
                return self._end(held, "length", (token,))
            self._push(held, (token,))
        return None

    def _push(
        self,
        held: _Held,
        ids: tuple[int, ...],
        finish: FinishReason | None = None,
        error: str | None = None,
    ) -> None:
        top = held.request.sampling.logprobs
        scored = () if top is None else tuple(fake_logprob(one, top) for one in ids)
        held.answer.push(ids, finish, error, scored, held.prompt)
        held.prompt = None

    def _closed(self, request_id: str) -> None:
        if held := self._held.get(request_id):
            self._end(held, "abort")

    def _end(
        self,
        held: _Held,
        finish: FinishReason,
        ids: tuple[int, ...] = (),
        error: str | None = None,
    ) -> None:
        self._forget(held)
        self._aborted += finish == "abort"
        self._finished += finish in ("stop", "length")
        self._push(held, ids, finish, error)
        if self._started and not self._lost:
            self._admit()

    def _forget(self, held: _Held) -> None:
        self._held.pop(held.request.request_id, None)
        if held.task and held.task is not asyncio.current_task():
            held.task.cancel()
