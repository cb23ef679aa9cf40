"""One rank: a loop that computes steps, a reader that listens, a loader that fetches weights.

The loop's thread is the only one that computes and hands out slots. The reader answers aborts at
once, also while a step runs, and sends a heartbeat with the step counter, so that the front can
tell a busy rank from a stuck one. The loader reads a second version while the first one decodes.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import queue
import secrets
import select
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from cluster.errors import EngineError, RoundhouseError
from serve_apps.engine.interface import Sampling
from serve_apps.engine.scheduler import Running, Scheduler, Step
from serve_apps.engine.wire import Frames, RankSpec, pack

if TYPE_CHECKING:
    from serve_apps.engine.kv_cache import KVCache
    from serve_apps.engine.model import LoadedModel

BEAT_S = 1.0
MAX_FAILED_STEPS = 3
"""In a row: after these the loop is broken, and a fresh process is the better answer."""
PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class Rank:
    """State of one rank; ``run`` returns when the front says stop or is gone."""

    def __init__(self, spec: RankSpec, sock: socket.socket) -> None:
        self._spec, self._sock = spec, sock
        self._send_lock = threading.Lock()
        self._changed = threading.Condition()  # guards what follows, but for what only loads touch
        self._scheduler: Scheduler | None = None
        self._models: dict[str, LoadedModel] = {}
        self._cache: KVCache | None = None
        self._stopping = False
        self._jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._failed_steps = 0

    def run(self) -> None:
        """Serve until told to stop."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        import torch

        from cluster.device import resolve_dtype

        torch.set_num_threads(self._spec.threads or len(os.sched_getaffinity(0)))
        cuda = self._spec.device == "cuda" or (
            self._spec.device == "auto" and torch.cuda.is_available()
        )
        self._device = torch.device("cuda" if cuda else "cpu")
        self._dtype = getattr(torch, resolve_dtype(self._spec.dtype, self._device.type))
        threading.Thread(target=self._load_jobs, name="loader", daemon=True).start()
        self._send({"t": "hello", "pid": os.getpid(), "device": self._device.type})
        while step := self._next_step():
            self._run_step(step)

    # The loop's thread

    def _next_step(self) -> Step | None:
        with self._changed:
            while not self._stopping:
                if self._scheduler and (step := self._scheduler.next_step()):
                    return step
                self._changed.wait()
        return None

    def _run_step(self, step: Step) -> None:
        assert self._scheduler
        assert self._cache
        try:
            tokens = self._compute(step, self._models[step.version], self._cache)
        except Exception:
            log.exception("step %d failed", step.number)
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

    def _compute(self, step: Step, model: LoadedModel, cache: KVCache) -> list[int]:
        from serve_apps.engine import attention, sampler

        logits = model.forward(step, attention.plan(step, cache))
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

    # The reader's thread

    def _read(self) -> None:
        frames, beat_at = Frames(), time.monotonic()
        try:
            while True:
                ready, _, _ = select.select([self._sock], [], [], BEAT_S)
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + BEAT_S
                    self._send({"t": "beat", "n": self._scheduler.steps if self._scheduler else 0})
                if not ready:
                    continue
                data = self._sock.recv(1 << 16)
                if not data:
                    return
                for message in frames.feed(data):
                    self._handle(message)
        except (OSError, RoundhouseError) as error:
            log.warning("the front is gone: %s", error)
        finally:
            with self._changed:
                self._stopping = True
                self._changed.notify_all()

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
        elif kind in ("load", "release"):
            self._jobs.put(message)
        elif kind == "stats":
            self._reply(message, self._stats())
        elif kind == "stop":
            with self._changed:
                self._stopping = True
                self._changed.notify_all()

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

    # The loader's thread

    def _load_jobs(self) -> None:
        while True:
            message = self._jobs.get()
            try:
                if message["t"] == "load":
                    reply = self._load(message["version"], message["directory"])
                else:
                    reply = self._release(message["version"])
            except RoundhouseError as error:
                self._reply_error(message, type(error).__name__, str(error))
            except Exception as error:
                log.exception("%s failed", message["t"])
                self._reply_error(message, "EngineError", f"{message['t']} failed: {error}")
            else:
                self._reply(message, reply)

    def _load(self, version: str, directory: str) -> dict[str, Any]:
        from serve_apps.engine.model import load_model

        model = load_model(directory, self._device, self._dtype)
        _trim()
        spec = self._spec
        length = min(spec.max_model_len, model.context or spec.max_model_len)
        cache = self._cache
        if cache is None or not self._models:
            cache = self._make_cache(model, length)
        elif cache.geometry != model.geometry or length < cache.slot_len:
            raise EngineError(
                f"{version} has another shape ({model.geometry}, context {length}) than what "
                f"this engine serves ({cache.geometry}, {cache.slot_len}); deploy it by itself"
            )
        with self._changed:
            if self._scheduler is None or cache is not self._cache:
                self._scheduler = Scheduler(cache.slots, spec.max_batch_tokens)
                self._cache = cache
            self._models[version] = model
        return {
            "max_model_len": cache.slot_len,
            "max_concurrent": cache.slots,
            "dtype": str(model.dtype).removeprefix("torch."),
            "vocab_size": model.vocab_size,
        }

    def _make_cache(self, model: LoadedModel, length: int) -> KVCache:
        from serve_apps.engine.kv_cache import KVCache, fit_slots, free_bytes

        spec = self._spec
        free = free_bytes(self._device)
        slots = fit_slots(model.geometry, length, spec.max_concurrent, spec.cache_tokens, free)
        return KVCache(model.geometry, slots, length, self._device)

    def _release(self, version: str) -> dict[str, Any]:
        with self._changed:
            if self._scheduler and self._scheduler.holds(version):
                raise EngineError(f"{version} still has requests")
            self._models.pop(version, None)
        _trim()
        return {}

    # Sending, from any thread

    def _reply(self, message: dict[str, Any], result: dict[str, Any]) -> None:
        self._send({"t": "reply", "call": message["call"], "result": result})

    def _reply_error(self, message: dict[str, Any], kind: str, text: str) -> None:
        self._send({"t": "reply", "call": message["call"], "error": [kind, text]})

    def _send(self, message: dict[str, Any]) -> None:
        with self._send_lock:
            self._sock.sendall(pack(message))


def _trim() -> None:
    """Give freed weights back to the system: glibc keeps hundreds of MB in the loader's arena."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc alone has it
        trim(0)


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


def run_rank(spec: RankSpec) -> None:
    """Run one rank in this process until its front stops it or goes away."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(spec.socket)
        Rank(spec, sock).run()


def main() -> int:
    """Host a rank in a plain child process: the spec is one JSON object on stdin."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rank %(levelname)s %(message)s")
    spec = RankSpec(**json.load(sys.stdin))
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != spec.parent_pid:  # it died before we could ask to be told
        return 1
    try:
        run_rank(spec)
    except (BrokenPipeError, ConnectionResetError):
        log.warning("the front went away in the middle of a frame")
    # The loader may be in the middle of a file; there is nothing of ours to save.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
