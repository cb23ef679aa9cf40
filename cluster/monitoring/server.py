"""A Prometheus of one's own beside the one-machine cluster: on loopback, ended by ``down``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster import ports, processes
from cluster.errors import ClusterError, MonitorError
from cluster.local import home_id
from cluster.monitoring.files import DASHBOARD, Place, rendered
from cluster.ports import LOOPBACK
from cluster.private import locked, make_private_dir, write_private
from cluster.processes import Proc
from cluster.session import Cluster

PROGRAM = "prometheus"
PORT = 9090
RETENTION = "15d"
READY_S = 60.0
INSTALL = (
    "no `prometheus` on PATH: install it (Debian, Ubuntu: `apt-get install "
    "--no-install-recommends prometheus`; elsewhere prometheus.io/download) and repeat the command"
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Server:
    """A Prometheus that runs for a cluster."""

    url: str
    port: int
    pid: int
    born: float
    """Seconds since the epoch: tells the process from a later one with its pid."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return Proc(self.pid, self.born, PROGRAM).alive()


def directory(home: Path) -> Path:
    """Return where a home keeps its monitoring files and Prometheus' data."""
    return home / "monitoring"


def place(cluster: Cluster, port: int) -> Place:
    """Return what the files say of a cluster whose Prometheus listens on ``port``."""
    return Place(
        discovery=f"{cluster.dashboard}/api/prometheus/sd",
        token_file=str(cluster.token_file),
        prometheus=f"http://{LOOPBACK}:{port}",
        dashboards=str((directory(cluster.home) / DASHBOARD).parent),
    )


def running(home: Path) -> Server | None:
    """Return the home's Prometheus, or None when it does not run."""
    try:
        server = Server(**json.loads((directory(home) / "server.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return server if server.alive else None


def choose_port(wanted: int | None) -> int:
    """Return a port to listen on: the wanted one (0: any), else 9090 or the next that is free."""
    if wanted == 0:
        return ports.any_free()
    if wanted is not None:
        if not ports.is_free(wanted):
            holder = processes.listener(wanted)
            raise ClusterError(f"port {wanted} is held by {holder}; choose another with --port")
        return wanted
    return next((p for p in range(PORT, PORT + ports.TRIES) if ports.is_free(p)), 0) or (
        ports.any_free()
    )


def up(cluster: Cluster, port: int | None, say: Say) -> Server | None:
    """Write the files for ``cluster`` and see to it that a Prometheus follows them.

    Returns None where none is installed: the files are there all the same. One that runs already
    is told to read them again. MonitorError when it does not start.
    """
    folder = make_private_dir(directory(cluster.home))
    with locked(folder / ".lock", "monitoring is being set up", timeout_s=READY_S):
        server = running(cluster.home)
        if server and port not in {None, 0, server.port}:
            raise MonitorError(
                f"Prometheus runs on port {server.port} already (pid {server.pid}); "
                "`roundhouse down` ends it with its cluster, or leave --port away"
            )
        at = server.port if server else choose_port(port)
        changed = write(folder, rendered(place(cluster, at)))
        if server:
            if changed:
                os.kill(server.pid, signal.SIGHUP)
                say("Prometheus reads its files again")
            return server
        program = shutil.which(PROGRAM)
        return _start(program, cluster, folder, at) if program else None


def write(folder: Path, files: dict[str, str]) -> list[str]:
    """Write files that only their owner may read; returns those that were not so before."""
    changed = []
    for name, text in files.items():
        path = folder / name
        make_private_dir(path.parent)
        if not path.is_file() or path.read_text() != text:
            write_private(path, text)
            changed.append(name)
    return changed


def command(program: str, folder: Path, port: int) -> list[str]:
    """Return Prometheus' command line."""
    return [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--storage.tsdb.retention.time={RETENTION}",
        f"--web.listen-address={LOOPBACK}:{port}",
    ]


def _start(program: str, cluster: Cluster, folder: Path, port: int) -> Server:
    log = folder / "prometheus.log"
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as sink:
        process = subprocess.Popen(
            command(program, folder, port),
            cwd=folder,
            # the mark by which `down` finds what belongs to the home
            env={**os.environ, processes.MARK: f"{home_id(cluster.home)}-monitoring"},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(
            f"http://{LOOPBACK}:{port}",
            port,
            process.pid,
            psutil.Process(process.pid).create_time(),
        )
        write_private(folder / "server.json", json.dumps(asdict(server)) + "\n")
        _wait(server, process, log)
    except BaseException:
        process.kill()
        process.wait(10)
        raise
    return server


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    import requests

    deadline = time.monotonic() + READY_S
    with requests.Session() as session:
        session.trust_env = False  # no proxy for loopback
        while True:
            try:
                if session.get(f"{server.url}/-/ready", timeout=2).ok:
                    return
            except requests.RequestException:
                pass  # not yet; the deadline decides
            ended = process.poll()
            if ended is not None or time.monotonic() > deadline:
                how = f"exit {ended}" if ended is not None else f"not ready in {READY_S:.0f} s"
                tail = log.read_text(errors="replace")[-1500:].strip()
                raise MonitorError(f"Prometheus did not start ({how}); {log} ends with:\n{tail}")
            time.sleep(0.1)
