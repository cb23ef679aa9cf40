"""Can the demo run here? Asked before anything is installed, so: the standard library alone.

Runs under any Python from 3.8 on, in order to say in one line that a newer one is needed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

GIB = 1 << 30

# Measured on two cores; `make demo` prints what it really took.
VENV_GIB = 3.0
LIBRARY_GIB = 0.6
RUNS_GIB = 2.4
MEMORY_GIB = 12.0
MINUTES_FAST = (4, 8)
MINUTES_SLOW = (8, 16)
PYTHONS = ((3, 11), (3, 12))
FAST_FLAGS = {"amx_bf16", "avx512_bf16"}


class Facts(NamedTuple):
    """What was found; tests hand in their own."""

    python: Any  # (major, minor)
    executable: str
    memory_bytes: int
    disk_free_bytes: int
    disk_path: str
    installed: bool
    cores: int
    fast_bf16: bool


def look(root: Path) -> Facts:
    """Read this machine. ``root`` is where `.venv` and `.roundhouse` will lie."""
    return Facts(
        python=sys.version_info[:2],
        executable=sys.executable or "python3",
        memory_bytes=_memory_bytes(),
        disk_free_bytes=shutil.disk_usage(str(root)).free,
        disk_path=str(root),
        installed=any((root / ".venv").glob("lib/python*/site-packages/ray")),
        cores=os.cpu_count() or 1,
        fast_bf16=bool(FAST_FLAGS & _cpu_flags()),
    )


def problem(facts: Facts) -> str | None:
    """Return the one line that says why it cannot work here and what to do, or ``None``."""
    version = ".".join(str(part) for part in facts.python)
    if tuple(facts.python) not in PYTHONS:
        return (
            f"Python 3.11 or 3.12 is needed, {facts.executable} is {version}; "
            "install one and run `make PYTHON=python3.11 ...`"
        )
    # Machines sold with so much report a little less.
    if facts.memory_bytes < (MEMORY_GIB - 0.5) * GIB:
        return (
            f"{MEMORY_GIB:.0f} GiB of memory are needed (training holds most of it), this "
            f"machine has {facts.memory_bytes / GIB:.1f}; use a larger machine or raise the "
            "container's limit"
        )
    needed = disk_gib(facts)
    if facts.disk_free_bytes < needed * GIB:
        return (
            f"{needed:.1f} GiB of disk are needed, {facts.disk_path} has "
            f"{facts.disk_free_bytes / GIB:.1f} free; make room there, or clone onto another disk"
        )
    return None


def disk_gib(facts: Facts) -> float:
    """Return the disk that the demo takes from here on, in GiB."""
    return (0.0 if facts.installed else VENV_GIB) + LIBRARY_GIB + RUNS_GIB


def announcement(facts: Facts) -> list[str]:
    """Return the lines that say what the demo will take here."""
    low, high = MINUTES_FAST if facts.fast_bf16 else MINUTES_SLOW
    venv = "installed already" if facts.installed else f"{VENV_GIB:.1f} GiB for .venv"
    number_format = "yes" if facts.fast_bf16 else "no (training and serving use fp32)"
    return [
        "This will take, on this machine:",
        f"  disk       {disk_gib(facts):.1f} GiB of {facts.disk_free_bytes / GIB:.1f} free "
        f"({venv}, {LIBRARY_GIB:.1f} models, {RUNS_GIB:.1f} runs and scratch)",
        f"  memory     up to {MEMORY_GIB:.0f} GiB of {facts.memory_bytes / GIB:.1f}",
        f"  time       {low} to {high} minutes after the install ({facts.cores} cores)",
        f"  fast bf16  {number_format}",
    ]


def _memory_bytes() -> int:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        total = 0
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (Path("/sys/fs/cgroup") / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text)) if total else int(text)
            break
    return total


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def main() -> int:
    """Announce, or say in one line on standard error why not; return the exit status."""
    facts = look(Path.cwd())
    trouble = problem(facts)
    if trouble:
        sys.stderr.write("error: " + trouble + "\n")
        return 1
    sys.stdout.write("\n".join(announcement(facts)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
