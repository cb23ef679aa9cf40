"""Who computes what in the next step. Pure: no torch, no clock, no thread.

A step runs one version's weights over a packed row of tokens: one token of each decoding request
first, then chunks of the oldest prompts, in all at most ``max_batch_tokens``. A request starts
when the cache has blocks for all of its tokens so far. While it answers it takes one block after
the other; when there is none left, the request of least rank gives up its own and waits at the
head of the queue. Most of what it had computed is found again there, so little is lost.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from serve_apps.engine.interface import FinishReason, Logprob, PromptInfo
from serve_apps.engine.lookup import Lookup
from serve_apps.engine.paging import Paging, Running
from serve_apps.engine.plan import BLOCK, blocks_for
from serve_apps.engine.steps import Picked, Step, Work
from serve_apps.engine.wire import Told

__all__ = ["Picked", "Running", "Scheduler", "Step", "Work"]

MAX_SCORED = 256
"""Prompt tokens of one step whose logits are all wanted: whole vocabularies of each are held."""
_rank = attrgetter("rank")


class Scheduler:
    """By priority, then first come, first served; decoding first; versions take turns."""

    def __init__(
        self,
        blocks: int,
        max_batch_tokens: int,
        max_running: int,
        prefix_cache: bool = True,
        guesses: int = 0,
    ) -> None:
        """``guesses``: at most so many tokens of an answer are guessed ahead of each step."""
        self.paging = Paging(blocks, prefix_cache)
        self.max_batch_tokens, self.max_running = max_batch_tokens, max_running
        self.guesses = guesses
        self.waiting: list[Running] = []
        """In the order of rank."""
        self.running: list[Running] = []
        """In the order in which they started."""
        self.expired: list[str] = []
        """Requests whose deadline passed before they started, to be told and cleared by you."""
        self.steps = 0
        self.prompt_tokens = self.cached_prompt_tokens = self.generated = 0
        self.finished = self.aborted = self.preemptions = self.expiries = 0
        self.guessed = self.guessed_right = 0
        self._by_id: dict[str, Running] = {}
        self._arrivals = 0
        self._deadlines = 0  # waiting requests that have one
        self._version_step: dict[str, int] = {}

    @property
    def held_tokens(self) -> int:
        """Positions of the blocks that requests hold."""
        return self.paging.pool.held * BLOCK

    def add(self, request: Running) -> None:
        """Queue a request; it must fit into the cache when it is there alone."""
        assert request.request_id not in self._by_id, "request ids are unique"
        longest = len(request.ids) + max(request.max_tokens - 1, 0)  # the last is never read
        assert blocks_for(longest) <= self.paging.pool.total, "checked at admission"
        self._arrivals += 1
        request.arrival = self._arrivals
        self._by_id[request.request_id] = request
        if self.guesses and not request.sampling.follows_history:
            request.lookup = Lookup(self.guesses)
        self._deadlines += request.deadline is not None
        insort(self.waiting, request, key=_rank)

    def holds(self, version: str, adapter: str | None = None) -> bool:
        """Whether a request still needs this version's weights, or an adapter's of it."""
        return any(
            r.version == version and adapter in (None, r.adapter) for r in self._by_id.values()
        )

    def forget(self, version: str, adapter: str | None = None) -> None:
        """Forget what the cache knows of weights that no request needs any more."""
        assert not self.holds(version, adapter)
        self.paging.pool.forget(version, adapter)

    def move(self, source: tuple[str, str], target: tuple[str, str]) -> list[Running]:
        """Have requests without a token begin anew on other weights; return them.

        ``source`` and ``target`` are (version, adapter). Call it between two steps.
        """
        mine = [r for r in self._by_id.values() if (r.version, r.adapter) == source and r.may_move]
        for request in mine:
            if request.blocks:
                self.running.remove(request)
                self.paging.drop(request)
                insort(self.waiting, request, key=_rank)
            self.paging.rename(request, *target)
        return mine

    def abort(self, request_id: str) -> bool:
        """Drop a request; its blocks are free for the next step. False when it is unknown.

        Safe while a step is being computed: blocks are handed out by ``next_step`` alone, so
        whatever the running step still writes there is overwritten before it is read.
        """
        request = self._by_id.get(request_id)
        if request is None:
            return False
        self.aborted += 1
        self._end(request)
        return True

    def next_step(self, now: float = 0.0) -> Step | None:
        """Compose the next step at the time ``now`` (seconds); ``None`` when nothing is to do."""
        self._expire(now)
        self._start(now)
        while self.running:
            version = min(
                {r.version: None for r in self.running},  # a dict keeps the order of arrival
                key=lambda v: self._version_step.get(v, -1),
            )
            decode, prefill = self._compose([r for r in self.running if r.version == version])
            if decode or prefill:
                break  # else all of the version's requests had to give up their blocks
        else:
            return None
        self.steps += 1
        alive = {r.version for r in self.running}
        self._version_step = {v: n for v, n in self._version_step.items() if v in alive}
        self._version_step[version] = self.steps
        for work in decode + prefill:
            work.request.last_step = self.steps
        return Step(self.steps, version, _by_adapter(decode), _by_adapter(prefill))

    def complete(
        self, step: Step, picked: Sequence[Picked], scores: Sequence[Sequence[Logprob]] = ()
    ) -> list[Told]:
        """Book one computed step.

        ``picked`` is for ``step.picks`` and ``scores`` for ``step.scoring``, in their order.
        """
        tokens, scored = iter(picked), iter(scores)
        outputs = []
        for work in step.work:
            request = work.request
            picks = [next(tokens) for _ in range(work.picks)]
            score = next(scored) if work.scored else ()
            if request.ended:  # aborted while the step was computed
                continue
            request.scores.extend(score)
            request.cached += work.count
            self.paging.computed(request)
            self._count_prompt(request)
            if picks:
                outputs.append(self._append(work, picks))
            elif request.max_tokens == 0 and request.cached == request.prompt_len:
                outputs.append(self._output(request, (), "length"))
        assert next(tokens, None) is None, "one token for each of step.picks"
        return outputs

    def fail(self, step: Step) -> list[str]:
        """Drop all requests of a step that could not be computed; return their ids."""
        failed = [w.request for w in step.work if not w.request.ended]
        for request in failed:
            self._end(request)
        return [r.request_id for r in failed]

    def check(self) -> None:
        """Assert the accounting: blocks and requests are held by exactly one another."""
        self.paging.check(self.running)
        assert len(self._by_id) == len(self.running) + len(self.waiting)
        assert not any(r.blocks for r in self.waiting)
        assert self.waiting == sorted(self.waiting, key=_rank)
        assert self._deadlines == sum(
            r.deadline is not None and r.started_at is None for r in self.waiting
        )

    # Who starts

    def _expire(self, now: float) -> None:
        if not self._deadlines:
            return
        for request in self.waiting[:]:
            late = request.deadline is not None and request.deadline <= now
            if late and request.started_at is None:
                self.expiries += 1
                self.expired.append(request.request_id)
                self._end(request)

    def _start(self, now: float) -> None:
        """Start requests by rank while there is room for them.

        One that fits not holds up those behind it, else a large one would never start. One whose
        beginning is being computed by another lets them pass: it needs nothing but time.
        """
        at = 0
        while at < len(self.waiting) and len(self.running) < self.max_running:
            request = self.waiting[at]
            if self.paging.still_waits(request):
                at += 1
                continue
            found = self.paging.hits(request)
            if self.paging.waits(request, found):
                at += 1
                continue
            # Each that runs will soon want another block; to start now and stop then is for nothing
            if not self.paging.fits(request, found, beside=len(self.running)):
                return
            del self.waiting[at]
            self.running.append(request)
            self.paging.start(request, found)
            if request.started_at is None:
                self._deadlines -= request.deadline is not None
                request.started_at = now
                request.hit_tokens = min(request.cached, request.prompt_len)
                self.cached_prompt_tokens += request.hit_tokens
                self._count_prompt(request)

    # Who computes

    def _compose(self, mine: list[Running]) -> tuple[tuple[Work, ...], tuple[Work, ...]]:
        decoding = [r for r in mine if r.decodes]
        # With more decoding requests than the budget those that waited longest go first, and one
        # token stays for the oldest prompt: a stream of answers must not hold it up for ever. A
        # budget of one token goes to the ones and the others by turns.
        spare = int(len(decoding) < len(mine))
        if self.max_batch_tokens == 1:
            spare *= self.steps % 2
        if len(decoding) > self.max_batch_tokens - spare:
            decoding.sort(key=lambda r: r.last_step)
            decoding = decoding[: self.max_batch_tokens - spare]
        decoding = self._grown(decoding)
        prompts = [r for r in mine if r.blocks and not r.decodes]
        room = self.max_batch_tokens - len(decoding) - len(prompts)
        decode = list[Work]()
        for request in decoding:
            guess = self._guess(request, room)
            room -= len(guess)
            logits = 1 + len(guess)
            decode.append(
                Work(request, request.cached, 1, True, request.blocks, logits, guess=guess)
            )
        computed = sum(work.picks for work in decode)
        return tuple(decode), self._chunks(prompts, self.max_batch_tokens - computed)

    def _guess(self, request: Running, room: int) -> tuple[int, ...]:
        """Return what the answer may go on with, as far as budget and cache have room for it."""
        if request.lookup is None:
            return ()
        room = min(room, request.max_tokens - request.answered - 1)
        guess = request.lookup.guess(request.ids, room)
        guess = guess[: self.paging.stretch(request, len(guess), spare=len(self.running))]
        self.guessed += len(guess)
        return guess

    def _grown(self, decoding: list[Running]) -> list[Running]:
        """Give each the block that it needs; return those that have one, in order of start."""
        needy = [r for r in decoding if r.cached == len(r.blocks) * BLOCK]
        for request in sorted(needy, key=_rank):
            while request.blocks and not self.paging.grow(request):
                # Never one that has grown in this round: those are of higher rank.
                self._preempt(max(self.running, key=_rank))
        return [r for r in decoding if r.blocks] if needy else decoding

    def _preempt(self, request: Running) -> None:
        self.preemptions += 1
        self.running.remove(request)
        self.paging.drop(request)
        insort(self.waiting, request, key=_rank)

    def _chunks(self, prompts: list[Running], budget: int) -> tuple[Work, ...]:
        chunks, scorable = list[Work](), MAX_SCORED
        for request in prompts:
            start = request.cached
            count = min(budget, len(request.ids) - start)
            first = max(start, request.unscored)
            scored = max(0, min(start + count, request.prompt_len - 1) - first)
            if scored > scorable:
                count, scored = first + scorable - start, scorable
            if count <= 0:
                continue
            budget, scorable = budget - count, scorable - scored
            end = start + count
            samples = end == len(request.ids) and request.max_tokens > 0
            logits = end - first if scored else int(samples)
            chunks.append(Work(request, start, count, samples, request.blocks, logits, scored))
        return tuple(chunks)

    # What came of it

    def _append(self, work: Work, picks: Sequence[Picked]) -> Told:
        """Append what was picked, as long as it is what was guessed, and the token after that."""
        request, ids, logprobs = work.request, list[int](), list[Logprob]()
        finish: FinishReason | None = None
        error: str | None = None
        for n, picked in enumerate(picks):
            kept, finish, error = self._one(request, picked)
            if kept:
                ids.append(picked.token)
                logprobs += () if picked.logprob is None else (picked.logprob,)
            if finish or n == len(work.guess) or picked.token != work.guess[n]:
                break
        if request.lookup and work.guess:
            request.lookup.learn(len(work.guess), n)
            self.guessed_right += n
            request.cached += n  # the guess's keys and values stand where the token's would
            self.paging.computed(request)
        return self._output(request, tuple(ids), finish, error, tuple(logprobs))

    def _one(
        self, request: Running, picked: Picked
    ) -> tuple[bool, FinishReason | None, str | None]:
        """Append a token; return whether it is part of the answer, how that ends, and why."""
        if picked.error is not None:
            return False, "error", picked.error
        self.generated += 1
        if picked.token in request.stop_ids:
            return False, "stop", None
        request.ids.append(picked.token)
        if picked.finished:
            return True, "stop", None
        return True, "length" if request.answered == request.max_tokens else None, None

    def _output(
        self,
        request: Running,
        ids: tuple[int, ...],
        finish: FinishReason | None,
        error: str | None = None,
        logprobs: tuple[Logprob, ...] = (),
    ) -> Told:
        prompt = None
        if not request.told:
            assert request.started_at is not None
            queued_s = request.started_at - request.added_at
            prompt = PromptInfo(request.hit_tokens, queued_s, tuple(request.scores))
            request.told = True
        if finish:
            self.finished += finish != "error"
            self._end(request)
        return Told(request.request_id, ids, finish, error, logprobs, prompt)

    def _count_prompt(self, request: Running) -> None:
        """Count prompt tokens once, however often they are computed."""
        new = min(request.cached, request.prompt_len) - request.counted
        if new > 0:
            self.prompt_tokens += new
            request.counted += new

    def _end(self, request: Running) -> None:
        request.ended = True
        del self._by_id[request.request_id]
        if request.blocks:
            self.running.remove(request)
            self.paging.drop(request)
        else:
            self.waiting.remove(request)
            self._deadlines -= request.deadline is not None and request.started_at is None


def _by_adapter(work: tuple[Work, ...]) -> tuple[Work, ...]:
    """Put the rows of one adapter side by side: they are computed together."""
    return tuple(sorted(work, key=lambda w: w.request.adapter))
