"""Whole products under load: each started alone, waited for, watched, and ended by pid."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.env import ROOT
from benchmarks.load import Endpoint, LoadError, burst
from benchmarks.peers.environments import BASE, VLLM, vllm_environ

MARK = "ROUNDHOUSE_BENCH"
"""In the environment of every process that a benchmark starts, so that none is left behind."""
READY_S = 900.0
"""For a server to answer its first request; a compile from nothing takes minutes here."""
STOP_S = 30.0
MODEL = "smollm2-135m-instruct"
CONTEXT = 2048
MAX_CONCURRENT = 64
CHUNK_PER_TOKEN = {"stream_interval_ms": 0, "stream_chunks_per_s": 0}
"""Limits with which each step of the engine gives each answer a chunk."""


@dataclass(frozen=True)
class Setup:
    """What all servers are started with."""

    model: Path
    threads: int
    dtype: str
    """``auto``: each side's own choice; else the same for all."""


@dataclass(frozen=True)
class Running:
    """A server that has answered."""

    endpoint: Endpoint
    ready_s: float
    """From its start to the end of its first answer."""
    processes: Callable[[], list[psutil.Process]]

    def rss_mib(self) -> float:
        """Return the resident memory of all its processes, shared pages counted in each."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20

    def cpu_s(self) -> float:
        """Return the CPU seconds that its processes have used."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextlib.contextmanager
def ours(setup: Setup, limits: Mapping[str, Any] | None = None) -> Iterator[Running]:
    """Serve with the whole of Roundhouse: cluster, gateway with keys, replica and rank.

    ``limits`` are those of the gateway that differ from the defaults.
    """
    home = BASE / "home"
    home.mkdir(parents=True, exist_ok=True)
    config = BASE / "serve-http.yaml"
    described = {**our_config(setup), "limits": dict(limits or {})}
    config.write_text(json.dumps(described, indent=1))  # JSON is YAML

    def verb(*args: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", *args, "--json"],
            cwd=ROOT,
            env=os.environ | {"ROUNDHOUSE_HOME": str(home), "OMP_NUM_THREADS": str(setup.threads)},
            stdout=subprocess.PIPE,
            text=True,
            timeout=READY_S,
        )
        if done.returncode:
            raise LoadError(f"`roundhouse {' '.join(args)}` ended with {done.returncode}")
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    from cluster.local import home_id
    from cluster.processes import of_home

    def processes() -> list[psutil.Process]:
        found = (proc.handle() for proc in of_home(home_id(home)))
        return [process for process in found if process]

    began = time.monotonic()
    try:
        verb("up", "--port", "any")
        verb("models", "import", str(setup.model), "--name", MODEL)
        told = verb("deploy", str(config))
        key = Path(told["key_file"]).read_text().strip()
        endpoint = Endpoint(told["endpoint"], MODEL, key, {"ignore_eos": True})
        wait_for(endpoint, lambda: None)
        yield Running(endpoint, time.monotonic() - began, processes)
    finally:
        verb("down")


def our_config(setup: Setup) -> dict[str, Any]:
    """Return the file that ``roundhouse deploy`` is given."""
    engine = {
        "max_model_len": CONTEXT,
        "max_concurrent": MAX_CONCURRENT,
        "max_queued": 256,
        "cache_tokens": MAX_CONCURRENT * 512,
        "threads": setup.threads,
        "dtype": setup.dtype,
    }
    return {"models": [{"model": MODEL, "engine": engine}]}


def vllm_server(setup: Setup) -> contextlib.AbstractContextManager[Running]:
    """Serve with vLLM's own OpenAI server, from its environment."""
    port = free_port()
    # its console script looks for a distribution named vllm, which the CPU build is not
    command = [
        *(str(VLLM.python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(setup.model), "--served-model-name", MODEL, "--dtype", peer_dtype(setup)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", str(CONTEXT), "--max-num-seqs", str(MAX_CONCURRENT)),
    ]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", MODEL, extra={"ignore_eos": True})
    return spawned("vllm-server", command, environ_of(setup), endpoint)


@contextlib.contextmanager
def ray_serve_llm(setup: Setup) -> Iterator[Running]:
    """Serve with ray.serve.llm over vLLM's CPU build, in a Ray of its own."""
    port = free_port()
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", MODEL, extra={"ignore_eos": True})
    # short, because the path of a Unix socket is; deleted here, because a killed Ray leaves it
    with TemporaryDirectory(prefix="rsl-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        command = [
            *(str(VLLM.python), "-m", "benchmarks.peers.ray_serve_llm", "--scratch", scratch),
            *("--model", str(setup.model), "--name", MODEL, "--dtype", peer_dtype(setup)),
            *("--port", str(port), "--max-model-len", str(CONTEXT)),
            *("--max-num-seqs", str(MAX_CONCURRENT)),
        ]
        with spawned("ray-serve-llm", command, environ_of(setup), endpoint) as running:
            yield running


def transformers_serve(setup: Setup) -> contextlib.AbstractContextManager[Running]:
    """Serve with ``transformers serve --continuous-batching``, from the product's environment."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "transformers.cli.transformers", "serve", str(setup.model)),
        *("--continuous-batching", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512"),
        *("--attn-implementation", "sdpa", "--device", "cpu", "--dtype", peer_dtype(setup)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    # it knows no ignore_eos, but takes a whole generation config
    endless = {"eos_token_id": -1, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 64}
    endpoint = Endpoint(
        f"http://127.0.0.1:{port}/v1",
        str(setup.model),
        extra={"generation_config": json.dumps(endless)},
    )
    environ = {"OMP_NUM_THREADS": str(setup.threads), "HF_HUB_OFFLINE": "1"}
    return spawned("transformers-serve", command, environ, endpoint)


def peer_dtype(setup: Setup) -> str:
    """Return the number format of the peers: what is said, else what this processor is fast at.

    Their own choice is the checkpoint's bfloat16, in which they crawl without instructions for it.
    """
    from cluster.device import resolve_dtype

    return resolve_dtype(setup.dtype, "cpu")


def environ_of(setup: Setup) -> dict[str, str]:
    """Return what a server on vLLM needs; compiled code is kept from one start to the next."""
    return vllm_environ(BASE / "compiled" / "servers", setup.threads)


SERVERS: Mapping[str, Callable[[Setup], contextlib.AbstractContextManager[Running]]] = {
    "roundhouse": ours,
    "roundhouse-chunk-per-token": partial(ours, limits=CHUNK_PER_TOKEN),
    "vllm-server": vllm_server,
    "ray-serve-llm": ray_serve_llm,
    "transformers-serve": transformers_serve,
}


@contextlib.contextmanager
def spawned(
    name: str, command: Sequence[str], environ: Mapping[str, str], endpoint: Endpoint
) -> Iterator[Running]:
    """Run a server as a child until the block ends; what it prints goes to a file.

    LoadError when it ends by itself or does not answer within ``READY_S``.
    """
    mark = f"{name}-{os.getpid()}"
    log = BASE / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as sink:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | dict(environ) | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def look() -> None:
        if child.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise LoadError(f"{name} ended with status {child.returncode}:\n{tail}")

    try:
        wait_for(endpoint, look)
        yield Running(endpoint, time.monotonic() - began, lambda: family(child.pid, mark))
    finally:
        _end(child, mark)


def family(pid: int, mark: str) -> list[psutil.Process]:
    """Return a process, its descendants, and whoever else carries the mark."""
    found: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        found = {p.pid: p for p in (parent, *parent.children(recursive=True))}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            if process.environ().get(MARK) == mark:
                found[process.pid] = process
    return list(found.values())


def wait_for(endpoint: Endpoint, look: Callable[[], None]) -> None:
    """Ask until one short question is answered; ``look`` raises when that is hopeless."""
    deadline = time.monotonic() + READY_S
    while True:
        look()
        try:
            asyncio.run(burst(endpoint, ["Hello!"], 4, READY_S))
            return
        except (OSError, EOFError, TimeoutError, ExceptionGroup) as error:
            if time.monotonic() > deadline:
                raise LoadError(f"{endpoint.url} never answered: {_innermost(error)}") from None
        time.sleep(0.5)


def free_port() -> int:
    """Return a port of loopback that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def _end(child: subprocess.Popen[bytes], mark: str) -> None:
    everyone = family(child.pid, mark)
    child.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(STOP_S)
    for process in {p.pid: p for p in (*everyone, *family(child.pid, mark))}.values():
        with contextlib.suppress(psutil.Error):
            process.kill()
    child.wait(STOP_S)
