"""Rank 0: schedules, computes with the others, samples, and speaks to the front."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError, EngineError
from serve_apps.engine.rank import Rank
from serve_apps.engine.scheduler import Picked, Running, Scheduler, Step
from serve_apps.engine.wire import RankSpec, Told, unpack_sampling

if TYPE_CHECKING:
    import torch

    from serve_apps.engine.grammar import Grammars, Matcher
    from serve_apps.engine.interface import Logprob
    from serve_apps.engine.kv_cache import KVCache
    from serve_apps.engine.model import LoadedModel
    from serve_apps.engine.sampler import Picker

IDLE_S = 1.0
"""The followers hear from rank 0 this often, so that their wait for it can be short."""
MAX_FAILED_STEPS = 3
"""In a row: after these the loop is broken, and a fresh process is the better answer."""

log = logging.getLogger(__name__)


class Leader(Rank):
    """The loop's thread hands out blocks and picks tokens; nobody else does."""

    def __init__(self, spec: RankSpec, sock: socket.socket) -> None:
        super().__init__(spec, sock)
        self._scheduler: Scheduler | None = None
        self._pickers: dict[str, Picker] = {}
        self._grammars: dict[str, Grammars] = {}
        self._releases: deque[dict[str, Any]] = deque()
        self._failed_steps = 0
        self._checked = True  # nothing has moved since the accounts were checked
        # Alone there is nobody to tell that nothing happens
        self._idle_s = min(IDLE_S, spec.step_timeout_s / 4) if spec.num_ranks > 1 else None

    def _loop(self) -> None:
        while True:
            todo = self._next()
            self._tell_expired()
            if isinstance(todo, Step):
                self._run_step(todo)
            elif todo is None:
                self._group.send({"t": "stop"})
                return
            elif todo["t"] == "move":
                self._move(todo)
            else:
                self._group.send(todo)
                if todo["t"] == "release":
                    self._drop(todo["version"], todo.get("adapter"))
                    self._reply(todo, {})

    def _next(self) -> Step | dict[str, Any] | None:
        """Wait for something to do; None means stop."""
        with self._changed:
            while not self._stopping:
                if self._releases:
                    return self._releases.popleft()
                if scheduler := self._scheduler:
                    if step := scheduler.next_step(time.monotonic()):
                        self._steps, self._checked = step.number, False
                        return step
                    if scheduler.expired:
                        return {"t": "idle"}
                    if not self._checked:
                        scheduler.check()
                        self._checked = True
                if not self._changed.wait(self._idle_s):
                    return {"t": "idle"}
        return None

    def _tell_expired(self) -> None:
        if self._scheduler is None or not self._scheduler.expired:
            return
        with self._changed:
            late, self._scheduler.expired = self._scheduler.expired, []
            self._forget(late)
        self._send({"t": "step", "n": self._steps, "out": [], "expired": late})

    def _run_step(self, step: Step) -> None:
        assert self._scheduler
        try:
            picked, scores = self._compute(step)
        except Exception:
            log.exception("step %d failed", step.number)
            if self._group.size > 1:
                raise  # the others stand somewhere else in this step now
            with self._changed:
                failed = self._scheduler.fail(step)
                self._forget(failed)
            why = "the engine failed while it computed this answer; its log says why"
            self._send_step([Told(i, (), "error", why) for i in failed])
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise
            return
        self._failed_steps = 0
        with self._changed:
            outputs = self._scheduler.complete(step, picked, scores)
            self._forget([o.request_id for o in outputs if o.finish])
        self._send_step(outputs)

    def _move(self, message: dict[str, Any]) -> None:
        """Begin requests without a token anew on other weights; between two steps."""
        (old, _), (new, adapter) = message["source"], message["target"]
        with self._changed:
            moved: list[Running] = []
            if self._scheduler and new in self._models:
                moved = self._scheduler.move(tuple(message["source"]), (new, adapter))
            for request in moved:
                self._pickers[old].forget(request.request_id)
                self._pickers[new].add(
                    request.request_id,
                    request.ids,
                    request.sampling,
                    request.seed,
                    request.stop_ids,
                )
        # told in the order of steps: the front must know it before their first tokens come
        ids = [request.request_id for request in moved]
        told = {"moved": ids, "to": adapter or new}
        self._send({"t": "step", "n": self._steps, "out": [], **told})
        self._reply(message, {"moved": len(ids)})

    def _compute(self, step: Step) -> tuple[Sequence[Picked], list[list[Logprob]]]:
        plan = step.plan()
        if self._group.size > 1:
            self._group.send(plan.pack())
        logits = self._forward(plan, sampling=True)
        return pick(step, logits, self._pickers[step.version])

    def _send_step(self, out: Sequence[Told]) -> None:
        self._send({"t": "step", "n": self._steps, "out": [told.pack() for told in out]})

    def _cache_made(self, cache: KVCache) -> None:
        spec = self._spec
        self._scheduler = Scheduler(
            cache.blocks,
            spec.max_batch_tokens,
            spec.max_concurrent,
            spec.prefix_cache,
            spec.prompt_lookup,
        )

    def _ready(self, model: LoadedModel) -> None:
        from serve_apps.engine.grammar import Grammars

        # Not at the first grammar: all answers would stand still for it. A model without a
        # tokenizer, and one that cannot enforce grammars, says so to whoever asks for one.
        with contextlib.suppress(ConfigError):
            _ = Grammars(str(model.directory)).tokenizer

    def _loaded(self, version: str, model: LoadedModel) -> None:
        from serve_apps.engine.grammar import Grammars
        from serve_apps.engine.sampler import Picker

        self._pickers[version] = Picker(model.vocab_size, model.device)
        self._grammars[version] = Grammars(str(model.directory))

    def _dropped(self, version: str, adapter: str | None = None) -> None:
        if adapter is None:
            self._pickers.pop(version, None)
            self._grammars.pop(version, None)
        if self._scheduler:
            self._scheduler.forget(version, adapter)

    def _forget(self, request_ids: Sequence[str]) -> None:
        """Drop what sampling remembers of requests that have ended."""
        for picker in self._pickers.values():
            for request_id in request_ids:
                picker.forget(request_id)

    # The reader's thread

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "admit":
            self._admit(message)
        elif kind == "abort":
            with self._changed:
                if self._scheduler and self._scheduler.abort(message["id"]):
                    self._forget([message["id"]])
                self._changed.notify_all()
        elif kind == "release":
            self._release(message)
        elif kind == "move":
            with self._changed:
                self._releases.append(message)  # in the order of steps
                self._changed.notify_all()
        elif kind == "stats":
            self._reply(message, self._stats())
        elif kind == "stop":
            self._stop()
        else:
            super()._handle(message)

    def _admit(self, message: dict[str, Any]) -> None:
        request, matcher = _running(message), None
        if request.sampling.grammar is not None:
            try:
                matcher = self._matcher(request)
            except EngineError as error:
                self._send_step([Told(request.request_id, (), "error", str(error))])
                return
        with self._changed:
            assert self._scheduler
            self._pickers[request.version].add(
                request.request_id,
                message["prompt"],
                request.sampling,
                request.seed,
                request.stop_ids,
                matcher,
            )
            self._scheduler.add(request)
            self._changed.notify_all()

    def _matcher(self, request: Running) -> Matcher:
        assert request.sampling.grammar is not None
        return self._grammars[request.version].matcher(request.sampling.grammar)

    def _release(self, message: dict[str, Any]) -> None:
        version, adapter = message["version"], message.get("adapter")
        with self._changed:
            held = self._scheduler and self._scheduler.holds(version, adapter)
            if not held:
                self._releases.append(message)  # in the order of steps, for every rank
                self._changed.notify_all()
        if held:
            self._reply_error(message, "EngineError", f"{adapter or version} still has requests")

    def _stats(self) -> dict[str, Any]:
        with self._changed:
            scheduler = self._scheduler
            if scheduler is None:
                return {}
            scheduler.check()
            return {
                "running": len(scheduler.running),
                "waiting": len(scheduler.waiting),
                "cache_tokens_used": scheduler.held_tokens,
                "cache_tokens_total": self._cache.tokens if self._cache else 0,
                "prompt_tokens": scheduler.prompt_tokens,
                "generated_tokens": scheduler.generated,
                "finished": scheduler.finished,
                "aborted": scheduler.aborted,
                "cached_prompt_tokens": scheduler.cached_prompt_tokens,
                "preemptions": scheduler.preemptions,
                "expired": scheduler.expiries,
                "guessed": scheduler.guessed,
                "guessed_right": scheduler.guessed_right,
                "spare_bytes": self._reader.spare_bytes,
            }


def pick(
    step: Step, logits_BV: torch.Tensor, picker: Picker
) -> tuple[Sequence[Picked], list[list[Logprob]]]:
    """Return the tokens for ``step.picks`` and the scores of ``step.scoring``."""
    from serve_apps.engine import sampler

    scores = []
    if step.scoring:
        last, at = list[int](), 0
        for work in step.work:
            if work.scored:
                top = work.request.sampling.prompt_logprobs or 0
                rows = logits_BV[at : at + work.scored]
                scores.append(sampler.prompt_logprobs(rows, work.targets, top))
            at += work.logits
            last += range(at - work.picks, at)
        logits_BV = logits_BV[last]
    asked = step.picks
    return picker.pick(logits_BV, asked) if asked else [], scores


def _running(message: dict[str, Any]) -> Running:
    sampling, now = unpack_sampling(message["sampling"]), time.monotonic()
    within = message["deadline_s"]
    return Running(
        request_id=message["id"],
        version=message["version"],
        ids=list(message["prompt"]),
        max_tokens=message["max_tokens"],
        sampling=sampling,
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        stop_ids=frozenset(message["stop"]),
        priority=message["priority"],
        salt=message["salt"],
        adapter=message.get("adapter", ""),
        pinned=message.get("pinned", False),
        added_at=now,
        deadline=None if within is None else now + within,
    )
