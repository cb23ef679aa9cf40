"""One rank: its share of each version, its cache, and the threads that every rank has.

The loop's thread is the only one that computes steps; `leader.py` and `follower.py` are the two
loops. The reader listens to the front and sends a heartbeat, so that the front can tell a busy
rank from a stuck one. The loader reads a second version while the first one decodes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import EngineError, RoundhouseError
from serve_apps.engine.native import build
from serve_apps.engine.plan import StepPlan
from serve_apps.engine.reading import Reader, tensors_of
from serve_apps.engine.wire import Frames, RankSpec, pack

if TYPE_CHECKING:
    import torch

    from serve_apps.engine.group import Group
    from serve_apps.engine.kv_cache import KVCache
    from serve_apps.engine.model import LoadedModel

BEAT_S = 1.0
LOAD = ("version", "directory", "holder")
"""What the front says of a version to load."""
ADAPT = ("adapter", "base", "directory", "max_rank", "holder")
"""What the front says of an adapter to read."""
LEAVE_S = 5.0
"""How long a rank whose front is gone may take to get out of a step."""

log = logging.getLogger(__name__)


class Rank(ABC):
    """What the two kinds of rank share; ``run`` returns when the engine is told to stop."""

    def __init__(self, spec: RankSpec, sock: socket.socket) -> None:
        self._spec, self._sock = spec, sock
        self._send_lock = threading.Lock()
        self._changed = threading.Condition()  # guards what the loop and the reader both touch
        self._models: dict[str, LoadedModel] = {}
        self._cache: KVCache | None = None
        self._max_len = 0  # tokens of the longest request, once there is a cache
        self._stopping = self._ended = False
        self._steps = 0
        self._jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def run(self) -> None:
        """Join the other ranks and serve until told to stop."""
        if self._spec.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers shards over what it sees
            build.begin()  # if need be, while this process imports
        import torch

        from cluster.device import resolve_dtype
        from serve_apps.engine.group import Group

        self._device = self._pick_device()
        self._dtype = getattr(torch, resolve_dtype(self._spec.dtype, self._device.type))
        self._group: Group = Group(self._spec, self._device)
        self._reader = Reader(self._spec, self._group, self._device, self._dtype)
        hello = {"t": "hello", "rank": self._spec.rank, "pid": os.getpid()}
        self._send({**hello, "device": self._device.type})
        self._start_loader()
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        try:
            self._loop()
        finally:
            self._reader.close()
        self._ended = True

    def _start_loader(self) -> None:
        """Start the loader with one CPU thread, and give this thread all the others.

        OpenMP keeps a team of threads for each thread that computes. With more of them in all
        than there are cores, GNU's waits in the kernel at every layer instead of spinning, and
        every step is slower for it, even while the loader sleeps.
        """
        import torch

        ready = threading.Event()

        def load() -> None:
            torch.set_num_threads(1)
            torch.get_num_threads()  # a thread takes the number of that moment when it first asks
            ready.set()
            self._load_jobs()

        threading.Thread(target=load, name="loader", daemon=True).start()
        if not ready.wait(LEAVE_S):  # nothing that can block stands before it is set
            raise EngineError(f"the loader's thread did not start within {LEAVE_S:.0f} s")
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(self._spec.threads or max(1, cores // self._spec.num_ranks))

    def _pick_device(self) -> torch.device:
        import torch

        if self._spec.device == "cpu" or not torch.cuda.is_available():
            if self._spec.device == "cuda":
                raise EngineError("engine.device is cuda and torch sees no GPU here")
            return torch.device("cpu")
        os.environ["LOCAL_RANK"] = str(self._spec.local_device)  # where transformers puts a shard
        torch.cuda.set_device(self._spec.local_device)
        return torch.device("cuda", self._spec.local_device)

    @abstractmethod
    def _loop(self) -> None:
        """Compute steps on the calling thread until the engine is told to stop."""

    def _handle(self, message: dict[str, Any]) -> None:
        """Take a message of the front; called by the reader's thread."""
        if message["t"] in ("load", "adapt"):
            self._jobs.put(message)

    # The loop's thread

    def _forward(self, plan: StepPlan, sampling: bool) -> torch.Tensor:
        from serve_apps.engine import attention

        assert self._cache
        attending = attention.plan(plan, self._cache)
        return self._models[plan.version].forward(plan, attending, sampling)

    def _drop(self, version: str, adapter: str | None = None) -> None:
        """Forget a version, or an adapter of it, between two steps."""
        if adapter is not None:
            with self._changed:
                if model := self._models.get(version):
                    model.adapters.drop(adapter)
                self._dropped(version, adapter)
            return
        with self._changed:
            model = self._models.pop(version, None)
            self._dropped(version)
        if model is not None:
            model.close()
            del model
            self._reader.leave(version)
            trim()

    # The reader's thread

    def _read(self) -> None:
        frames, beat_at = Frames(), time.monotonic()
        try:
            while True:
                ready, _, _ = select.select([self._sock], [], [], BEAT_S)
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + BEAT_S
                    self._send({"t": "beat", "n": self._steps})
                    self._reader.tidy()
                if not ready:
                    continue
                data = self._sock.recv(1 << 16)
                if not data:
                    break
                for message in frames.feed(data):
                    self._handle(message)
        except (OSError, ValueError, RoundhouseError) as error:
            if not self._ended:  # else we closed the socket ourselves
                log.warning("the front is gone: %s", error)
        self._stop()
        time.sleep(LEAVE_S)
        if not self._ended:
            os._exit(1)  # it waits for ranks that are gone as well; nothing is worth saving

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    # The loader's thread

    def _load_jobs(self) -> None:
        while True:
            message = self._jobs.get()
            try:
                if message["t"] == "adapt":
                    told = self._adapt(**{k: message[k] for k in ADAPT})
                else:
                    told = self._load_version(**{k: message[k] for k in LOAD})
            except RoundhouseError as error:
                self._reply_error(message, type(error).__name__, str(error))
            except Exception as error:
                log.exception("load failed")
                self._reply_error(message, "EngineError", f"load failed: {error}")
            else:
                self._reply(message, told)

    def _load_version(self, version: str, directory: str, holder: str | None) -> dict[str, Any]:
        try:
            return self._load(version, directory, holder)
        except Exception:
            if version not in self._models:
                self._reader.leave(version)
            raise

    def _load(self, version: str, directory: str, holder: str | None) -> dict[str, Any]:
        spec, group = self._spec, self._group
        with self._changed:  # versions go while this one is read
            held = dict(self._models)
        model = self._reader.model(version, Path(directory), holder, held)
        held.clear()
        self._ready(model)
        trim()
        length = min(spec.max_model_len, model.context or spec.max_model_len)
        cache = self._cache
        if cache is None or not self._models:
            cache = group.all_or_none(lambda: self._make_cache(model, length))
        elif cache.geometry != model.geometry or length < self._max_len:
            raise EngineError(
                f"{version} has another shape ({model.geometry}, context {length}) than what "
                f"this engine serves ({cache.geometry}, {self._max_len}); deploy it by itself"
            )
        with self._changed:
            if cache is not self._cache:
                self._cache, self._max_len = cache, length
                self._cache_made(cache)
            self._models[version] = model
            self._loaded(version, model)
        return {
            "max_model_len": self._max_len,
            "max_concurrent": spec.max_concurrent,
            "dtype": str(model.dtype).removeprefix("torch."),
            "vocab_size": model.vocab_size,
            "weight_bytes": model.weight_bytes,
        }

    def _adapt(
        self, adapter: str, base: str, directory: str, max_rank: int, holder: str | None
    ) -> dict[str, Any]:
        model = self._models.get(base)

        def read() -> int:
            if model is None:
                raise EngineError(f"adapter {adapter}: its base {base} is not loaded")
            stored = None
            if holder:
                from cluster.weights.client import fetch

                stored = tensors_of(fetch(adapter, holder))
            return model.adapters.read(adapter, Path(directory), max_rank, model.native, stored)

        try:
            return {"weight_bytes": self._group.all_or_none(read)}
        except EngineError:
            if model is not None:
                model.adapters.drop(adapter)  # it may fit here and on another rank not
            raise

    @abstractmethod
    def _cache_made(self, cache: KVCache) -> None:
        """Take note of a new cache, under the lock."""

    @abstractmethod
    def _ready(self, model: LoadedModel) -> None:
        """Do what takes time before a version is there, on the loader's thread."""

    @abstractmethod
    def _loaded(self, version: str, model: LoadedModel) -> None:
        """Take note of a version that can be computed now, under the lock."""

    @abstractmethod
    def _dropped(self, version: str, adapter: str | None = None) -> None:
        """Take note of a version or adapter that is gone, under the lock."""

    def _make_cache(self, model: LoadedModel, length: int) -> KVCache:
        from serve_apps.engine.kv_cache import KVCache, fit_blocks, free_bytes

        spec = self._spec
        free = free_bytes(self._device)
        if self._device.type == "cpu":
            free //= spec.num_ranks  # all of them share this machine's memory
        blocks = fit_blocks(model.geometry, length, spec.max_concurrent, spec.cache_tokens, free)
        return KVCache(model.geometry, self._group.least(blocks), self._device)

    # Sending, from any thread

    def _reply(self, message: dict[str, Any], result: dict[str, Any]) -> None:
        self._send({"t": "reply", "call": message["call"], "result": result})

    def _reply_error(self, message: dict[str, Any], kind: str, text: str) -> None:
        self._send({"t": "reply", "call": message["call"], "error": [kind, text]})

    def _send(self, message: dict[str, Any]) -> None:
        with self._send_lock:
            self._sock.sendall(pack(message))


def trim() -> None:
    """Give freed weights back to the system: glibc keeps hundreds of MB in the loader's arena."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc alone has it
        trim(0)
