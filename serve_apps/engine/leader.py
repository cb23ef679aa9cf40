"""Rank 0: schedules, computes with the others, samples, and speaks to the front."""

from __future__ import annotations

import logging
import secrets
import socket
from collections import deque
from typing import TYPE_CHECKING, Any

from serve_apps.engine.interface import Sampling
from serve_apps.engine.rank import Rank
from serve_apps.engine.scheduler import Running, Scheduler, Step
from serve_apps.engine.wire import RankSpec

if TYPE_CHECKING:
    from serve_apps.engine.kv_cache import KVCache

IDLE_S = 1.0
"""The followers hear from rank 0 this often, so that their wait for it can be short."""
MAX_FAILED_STEPS = 3
"""In a row: after these the loop is broken, and a fresh process is the better answer."""

log = logging.getLogger(__name__)


class Leader(Rank):
    """The loop's thread hands out slots and picks tokens; nobody else does."""

    def __init__(self, spec: RankSpec, sock: socket.socket) -> None:
        super().__init__(spec, sock)
        self._scheduler: Scheduler | None = None
        self._releases: deque[dict[str, Any]] = deque()
        self._failed_steps = 0
        # Alone there is nobody to tell that nothing happens
        self._idle_s = min(IDLE_S, spec.step_timeout_s / 4) if spec.num_ranks > 1 else None

    def _loop(self) -> None:
        while True:
            todo = self._next()
            if isinstance(todo, Step):
                self._run_step(todo)
            elif todo is None:
                self._group.send({"t": "stop"})
                return
            else:
                self._group.send(todo)
                if todo["t"] == "release":
                    self._drop(todo["version"])
                    self._reply(todo, {})

    def _next(self) -> Step | dict[str, Any] | None:
        """Wait for something to do; None means stop."""
        with self._changed:
            while not self._stopping:
                if self._releases:
                    return self._releases.popleft()
                if self._scheduler and (step := self._scheduler.next_step()):
                    self._steps = step.number
                    return step
                if not self._changed.wait(self._idle_s):
                    return {"t": "idle"}
        return None

    def _run_step(self, step: Step) -> None:
        assert self._scheduler
        try:
            tokens = self._compute(step)
        except Exception:
            log.exception("step %d failed", step.number)
            if self._group.size > 1:
                raise  # the others stand somewhere else in this step now
            with self._changed:
                failed = self._scheduler.fail(step)
            why = "the engine failed while it computed this answer; its log says why"
            self._send_step(step, [[i, [], "error", why] for i in failed])
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise
            return
        self._failed_steps = 0
        with self._changed:
            outputs = self._scheduler.complete(step, tokens)
        self._send_step(step, [[o.request_id, o.token_ids, o.finish, None] for o in outputs])

    def _compute(self, step: Step) -> list[int]:
        from serve_apps.engine import sampler

        plan = step.plan()
        self._group.send(plan.pack())
        logits = self._forward(plan, sampling=True)
        picks = step.sampling
        if not picks:
            return []
        return sampler.sample(
            logits,
            [r.sampling for r in picks],
            [r.seed for r in picks],
            [r.answered for r in picks],
        )

    def _send_step(self, step: Step, out: list[list[Any]]) -> None:
        self._send({"t": "step", "n": step.number, "out": out})

    def _cache_made(self, cache: KVCache) -> None:
        self._scheduler = Scheduler(cache.slots, self._spec.max_batch_tokens)

    # The reader's thread

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "admit":
            with self._changed:
                assert self._scheduler
                self._scheduler.add(_running(message))
                self._changed.notify_all()
        elif kind == "abort":
            with self._changed:
                if self._scheduler:
                    self._scheduler.abort(message["id"])
                self._changed.notify_all()
        elif kind == "release":
            self._release(message)
        elif kind == "stats":
            self._reply(message, self._stats())
        elif kind == "stop":
            self._stop()
        else:
            super()._handle(message)

    def _release(self, message: dict[str, Any]) -> None:
        version = message["version"]
        with self._changed:
            held = self._scheduler and self._scheduler.holds(version)
            if not held:
                self._releases.append(message)  # in the order of steps, for every rank
                self._changed.notify_all()
        if held:
            self._reply_error(message, "EngineError", f"{version} still has requests")

    def _stats(self) -> dict[str, Any]:
        with self._changed:
            scheduler = self._scheduler
            if scheduler is None:
                return {}
            scheduler.check()
            return {
                "running": len(scheduler.running),
                "waiting": len(scheduler.waiting),
                "cache_tokens_used": scheduler.cached_tokens,
                "cache_tokens_total": self._cache.tokens if self._cache else 0,
                "prompt_tokens": scheduler.prompt_tokens,
                "generated_tokens": scheduler.generated,
                "finished": scheduler.finished,
                "aborted": scheduler.aborted,
            }


def _running(message: dict[str, Any]) -> Running:
    temperature, top_p, top_k, seed = message["sampling"]
    return Running(
        request_id=message["id"],
        version=message["version"],
        ids=message["prompt"],
        max_tokens=message["max_tokens"],
        sampling=Sampling(temperature, top_p, top_k),
        seed=secrets.randbits(64) if seed is None else seed,
        stop_ids=frozenset(message["stop"]),
    )
