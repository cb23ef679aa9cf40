"""What this machine has, and what one cluster on it should declare. No Ray."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20
SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Machine:
    """Cores and bytes, read once."""

    cores: int
    memory_bytes: int
    memory_free_bytes: int
    shm_free_bytes: int


def look() -> Machine:
    """Return the machine as it is now; a container's memory limit counts as its memory."""
    import psutil

    memory = psutil.virtual_memory()
    limit = container_limit() or memory.total
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpu_count(),
        memory_bytes=min(memory.total, limit),
        memory_free_bytes=min(memory.available, limit),
        shm_free_bytes=shutil.disk_usage(SHM).free if SHM.is_dir() else 0,
    )


def cpu_count() -> int:
    """Return the number of cores, at least one."""
    return os.cpu_count() or 1


def container_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return this container's memory limit in bytes (cgroup v2, then v1), if there is one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        # cgroup v1 writes "no limit" as a number near 2**63
        if text.isdecimal() and int(text) < 1 << 60:
            return int(text)
    return None


def logical_cpus(cores: int) -> int:
    """Return how many CPUs to declare for ``cores``.

    On a small machine Serve's replicas, Train's workers and the job driver would otherwise wait
    for each other in silence; from eight cores on, what is there is enough.
    """
    return max(8, 2 * cores)


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Size of Ray's object store, and the directory to use when shared memory is too small."""

    size_bytes: int
    directory: Path | None = None


def object_store(machine: Machine, fallback: Path) -> ObjectStore:
    """Choose a fifth of the memory, at most 16 GiB and four fifths of what /dev/shm has free.

    The pages are taken only when they are written, so a large number costs nothing by itself.
    With less than 256 MiB of shared memory (a container's default is 64) the store goes into a
    file under ``fallback``: slower, and it works.
    """
    wish = min(machine.memory_bytes // 5, 16 * GIB)
    in_shm = min(wish, machine.shm_free_bytes * 4 // 5)
    if in_shm >= 256 * MIB:
        return ObjectStore(in_shm)
    return ObjectStore(max(256 * MIB, min(wish, 2 * GIB)), fallback)
