"""A computing thread gives way to processes that wake up, and keeps its share."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

from serve_apps.engine import slices


def slice_ns() -> int | None:
    """Return the calling thread's slice, where the kernel tells it."""
    path = Path(f"/proc/self/task/{threading.get_native_id()}/sched")
    found = re.search(r"se\.slice\s*:\s*(\d+)", path.read_text()) if path.is_file() else None
    return int(found[1]) if found else None


def after(work: list[str]) -> list[int | None]:
    """Ask in a thread of its own, and return its slice and that of a thread that it starts."""
    seen: list[int | None] = []

    def ask() -> None:
        slices.ask_for_long_slices()
        seen.append(slice_ns())
        child = threading.Thread(target=lambda: seen.append(slice_ns()))
        child.start()
        child.join(5)
        work.append(str(os.getpriority(os.PRIO_PROCESS, 0)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(5)
    return seen


def test_a_thread_and_those_that_it_starts_get_long_slices_at_the_same_priority() -> None:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if slice_ns() is None or release < (6, 12):
        pytest.skip("this kernel keeps its own slices, or does not tell them")
    nice: list[str] = []
    assert after(nice) == [slices.SLICE_NS, slices.SLICE_NS]
    assert nice == [str(os.getpriority(os.PRIO_PROCESS, 0))]
    assert slice_ns() != slices.SLICE_NS, "other threads keep theirs"


def test_a_machine_without_such_slices_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SCHED_SETATTR", {os.uname().machine: 1_000_000})  # ENOSYS
    nice: list[str] = []
    assert len(after(nice)) == 2
    monkeypatch.setattr(slices, "SCHED_SETATTR", {})
    assert len(after(nice)) == 2
    assert slice_ns() != slices.SLICE_NS
