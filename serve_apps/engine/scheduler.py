"""Who computes what in the next step. Pure: no torch, no clock, no thread.

A step runs one version's weights over a packed row of tokens: one token of each decoding request
first, then chunks of the oldest prompts, in all at most ``max_batch_tokens``. A request holds one
slot of the cache from its first chunk to its end.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_apps.engine.interface import FinishReason, Sampling
from serve_apps.engine.plan import Row, StepPlan


class SlotPool:
    """Which cache slots are free; the lowest goes first, so that neighbours stay neighbours."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total))
        self._held = set[int]()

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """Hand out the lowest free slot."""
        slot = heapq.heappop(self._free)
        self._held.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """Take a slot back; a slot that is not held is our bug."""
        self._held.remove(slot)
        heapq.heappush(self._free, slot)

    def check(self) -> None:
        """Every slot is either free or held, and exactly once."""
        assert len(self._free) + len(self._held) == self.total
        assert self._held.isdisjoint(self._free)


@dataclass(slots=True, eq=False)
class Running:
    """One request on its way: prompt and answer so far, and how much of both is in the cache."""

    request_id: str
    version: str
    ids: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int] = frozenset()
    prompt_len: int = field(init=False)
    cached: int = 0
    slot: int = -1
    last_step: int = -1
    ended: bool = False

    def __post_init__(self) -> None:
        self.prompt_len = len(self.ids)

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.prompt_len


@dataclass(frozen=True, slots=True)
class Work:
    """``count`` tokens of one request from position ``start`` on."""

    request: Running
    start: int
    count: int
    samples: bool
    """Whether these reach the end of what is known, so that a next token can be picked."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: ``decode`` in slot order (one token each), then prompt chunks."""

    number: int
    version: str
    decode: tuple[Work, ...]
    prefill: tuple[Work, ...]

    @property
    def work(self) -> tuple[Work, ...]:
        """All rows in packed order."""
        return self.decode + self.prefill

    @property
    def sampling(self) -> list[Running]:
        """The requests that get a token, in packed order."""
        return [w.request for w in self.work if w.samples]

    def plan(self) -> StepPlan:
        """Return what every rank needs in order to compute this step."""
        rows = tuple(
            Row(w.request.slot, w.start, w.request.ids[w.start : w.start + w.count], w.samples)
            for w in self.work
        )
        return StepPlan(self.number, self.version, len(self.decode), rows)


@dataclass(frozen=True, slots=True)
class Output:
    """What one step gave one request."""

    request_id: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None


class Scheduler:
    """First come, first served; decoding first; versions take turns, least recently run first."""

    def __init__(self, slots: int, max_batch_tokens: int) -> None:
        self.slots = SlotPool(slots)
        self.max_batch_tokens = max_batch_tokens
        self.waiting = deque[Running]()
        self.running: list[Running] = []
        self.steps = 0
        self.prompt_tokens = self.generated = self.finished = self.aborted = 0
        self._by_id: dict[str, Running] = {}
        self._version_step: dict[str, int] = {}

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values lie in held slots."""
        return sum(r.cached for r in self.running)

    def add(self, request: Running) -> None:
        """Queue a request; it starts when a slot is free and all before it have started."""
        assert request.request_id not in self._by_id, "request ids are unique"
        self._by_id[request.request_id] = request
        self.waiting.append(request)

    def holds(self, version: str) -> bool:
        """Whether a request still needs this version's weights."""
        return any(r.version == version for r in self._by_id.values())

    def abort(self, request_id: str) -> bool:
        """Drop a request; its slot is free for the next step. False when it is unknown.

        Safe while a step is being computed: slots are handed out by ``next_step`` alone, so
        whatever the running step still writes there is overwritten before it is read.
        """
        request = self._by_id.get(request_id)
        if request is None:
            return False
        self.aborted += 1
        self._end(request)
        return True

    def next_step(self) -> Step | None:
        """Compose the next step, or ``None`` when there is nothing to do."""
        while self.waiting and self.slots.free:
            request = self.waiting.popleft()
            request.slot = self.slots.take()
            self.running.append(request)
        if not self.running:
            return None
        version = min(
            {r.version: None for r in self.running},  # a dict keeps the order of arrival
            key=lambda v: self._version_step.get(v, -1),
        )
        mine = [r for r in self.running if r.version == version]
        decoding = [r for r in mine if r.answered]
        # With more decoding requests than the budget those that waited longest go first, and one
        # token stays for the oldest prompt: a stream of answers must not hold it up for ever.
        decoding.sort(key=lambda r: r.last_step)
        decoding = decoding[: self.max_batch_tokens - (len(decoding) < len(mine))]
        decoding.sort(key=lambda r: r.slot)
        decode = tuple(Work(r, r.cached, 1, True) for r in decoding)
        prefill = self._chunks(mine, self.max_batch_tokens - len(decode))
        self.steps += 1
        alive = {r.version for r in self.running}
        self._version_step = {v: n for v, n in self._version_step.items() if v in alive}
        self._version_step[version] = self.steps
        for work in decode + prefill:
            work.request.last_step = self.steps
        return Step(self.steps, version, decode, prefill)

    def complete(self, step: Step, tokens: Sequence[int]) -> list[Output]:
        """Book one computed step; ``tokens`` are the picked ids of ``step.sampling``, in order."""
        picked = iter(tokens)
        outputs = []
        for work in step.work:
            request = work.request
            token = next(picked) if work.samples else None
            if request.ended:  # aborted while the step was computed
                continue
            request.cached += work.count
            if work.start < request.prompt_len:
                self.prompt_tokens += work.count
            if token is not None:
                outputs.append(self._append(request, token))
        assert next(picked, None) is None, "one token for each request that samples"
        return outputs

    def fail(self, step: Step) -> list[str]:
        """Drop all requests of a step that could not be computed; return their ids."""
        failed = [w.request for w in step.work if not w.request.ended]
        for request in failed:
            self._end(request)
        return [r.request_id for r in failed]

    def check(self) -> None:
        """Assert the accounting: slots and requests are held by exactly one another."""
        self.slots.check()
        assert self.slots.total - self.slots.free == len(self.running)
        assert len(self._by_id) == len(self.running) + len(self.waiting)

    def _chunks(self, mine: list[Running], budget: int) -> tuple[Work, ...]:
        chunks = []
        for request in mine:
            if request.answered or budget == 0:
                continue
            count = min(budget, request.prompt_len - request.cached)
            budget -= count
            ends = request.cached + count == request.prompt_len
            chunks.append(Work(request, request.cached, count, ends))
        return tuple(chunks)

    def _append(self, request: Running, token: int) -> Output:
        self.generated += 1
        finish: FinishReason | None = None
        ids: tuple[int, ...] = ()
        if token in request.stop_ids:
            finish = "stop"
        else:
            request.ids.append(token)
            ids = (token,)
            finish = "length" if request.answered == request.max_tokens else None
        if finish:
            self.finished += 1
            self._end(request)
        return Output(request.request_id, ids, finish)

    def _end(self, request: Running) -> None:
        request.ended = True
        del self._by_id[request.request_id]
        if request.slot >= 0:
            self.running.remove(request)
            self.slots.give_back(request.slot)
        else:
            self.waiting.remove(request)
