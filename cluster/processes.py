"""Which processes are ours: found by mark, session and descent; ended by pid, never by name."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

MARK = "ROUNDHOUSE_CLUSTER_ID"
BIRTH_TOLERANCE_S = 1.0


@dataclass(frozen=True, slots=True)
class Proc:
    """One process. ``born`` (seconds since the epoch) tells it from a later one with its pid."""

    pid: int
    born: float
    name: str

    def alive(self) -> bool:
        """Say whether this very process still runs; a zombie does not."""
        return self.handle() is not None

    def handle(self) -> psutil.Process | None:
        """Return psutil's handle, or ``None`` when the process has ended."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.born) > BIRTH_TOLERANCE_S:
                return None
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except psutil.Error:
            return None


def describe(process: psutil.Process) -> Proc:
    """Return the small record of one process; psutil.Error when it has ended."""
    return Proc(process.pid, process.create_time(), _name(process))


def of_home(home_id: str) -> list[Proc]:
    """Return every living process of the clusters that were started for one home.

    ``home_id`` is the first part of the mark that ``up`` puts into the environment. Ray renames
    its workers, and that overwrites the place where a process keeps its environment: such a one
    is recognised by the session it shares with a marked process, or as the child of one.
    The caller and its ancestors are never among them.
    """
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    everyone = [p for p in psutil.process_iter() if p.pid not in spared]
    marked = [p for p in everyone if _mark(p).startswith(f"{home_id}-")]
    sessions = {s for p in marked if (s := _session(p)) is not None}
    found = {p.pid: p for p in marked}
    for process in everyone:
        if _session(process) in sessions and _is_ray(process):
            found[process.pid] = process
    for process in list(found.values()):
        with contextlib.suppress(psutil.Error):
            for child in process.children(recursive=True):
                if child.pid not in spared:
                    found[child.pid] = child
    procs = []
    for process in found.values():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                procs.append(describe(process))
    return sorted(procs, key=lambda proc: proc.born)


def end(procs: Iterable[Proc], grace_s: float = 3.0, kill_s: float = 5.0) -> list[Proc]:
    """Send TERM, wait, send KILL, wait; return those that are still there (none, as a rule)."""
    waiting = list(procs)
    for signal, limit_s in (("terminate", grace_s), ("kill", kill_s)):
        handles = [handle for proc in waiting if (handle := proc.handle())]
        for handle in handles:
            with contextlib.suppress(psutil.Error):
                getattr(handle, signal)()
        deadline = time.monotonic() + limit_s
        while (waiting := [p for p in waiting if p.alive()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not waiting:
            return []
    return waiting


def listener(port: int) -> str:
    """Say which process listens on a TCP port, as far as this user may know."""
    with contextlib.suppress(psutil.Error):
        for conn in psutil.net_connections("tcp"):
            here = conn.status == psutil.CONN_LISTEN and conn.laddr and conn.laddr[1] == port
            if here and conn.pid:
                with contextlib.suppress(psutil.Error):
                    return f"pid {conn.pid} ({_name(psutil.Process(conn.pid))})"
    return "a process that this user cannot see"


def _name(process: psutil.Process) -> str:
    line = process.cmdline()
    text = " ".join(line) if line else process.name()
    for known in ("gcs_server", "raylet", "log_monitor", "client.server", "monitor.py"):
        if f"{known} " in f"{text} " or f"/{known}" in text.split(" --")[0]:
            return known.removesuffix(".py")
    if "dashboard/dashboard.py" in text:
        return "dashboard"
    return (os.path.basename(line[0]) if line else text)[:60]


def _mark(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except (psutil.Error, OSError, ValueError):
        return ""


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _is_ray(process: psutil.Process) -> bool:
    try:
        return any("ray" in part.lower() for part in (process.name(), *process.cmdline()))
    except psutil.Error:
        return False
