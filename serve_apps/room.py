"""What models take of a node's memory, and whether one more version fits."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import NotEnough
from cluster.machine import GIB, container_limit
from serve_apps.engine.interface import EngineInfo

SPARE_BYTES = GIB // 8
"""Left free beside a new version."""
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_CGROUP = Path("/sys/fs/cgroup")


def node() -> str:
    """Return what tells this machine from others."""
    return socket.gethostname()


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the memory that processes take; what has ended takes none."""
    import psutil

    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += int(psutil.Process(pid).memory_info().rss) if pid else 0
    return total


def free_bytes(root: Path = _CGROUP) -> int:
    """Return the memory that could be taken now: the machine's, or what its container may.

    Page cache that a container holds counts as free: the kernel takes it back.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = container_limit(root)
    if limit is None:
        return free
    used = _number(root / "memory.current") or _number(root / "memory/memory.usage_in_bytes")
    cached = _stat(root / "memory.stat") or _stat(root / "memory/memory.stat")
    return max(min(free, limit - used + cached), 0)


def check(version: str, parameters: int | None, info: EngineInfo, spare: int = 0) -> None:
    """Raise NotEnough when the weights would not fit beside what is there.

    ``spare`` bytes are taken already, and kept for them. Weights on an accelerator are not looked
    at: there the allocator says no by itself.
    """
    if info.device != "cpu" or not parameters:
        return
    need, free = parameters * WIDTH.get(info.dtype, 4), free_bytes() + spare
    if need + SPARE_BYTES > free:
        raise NotEnough(
            f"{version} needs {_told(need)} of memory beside what is held (and "
            f"{_told(SPARE_BYTES)} stay free), {node()} has {_told(free)} free; stop something "
            "there, or give the model another node"
        )


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _stat(path: Path) -> int:
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        return sum(int(row[1]) for row in rows if row[0] == "inactive_file")
    except (OSError, ValueError, IndexError):
        return 0


def _told(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
