"""Who works on a run: each attempt's record, and the lock that keeps a second one out.

    attempts/1.json      the first attempt: Ray's submission id, or none for plain processes
    attempts/1.result    what result.json said when the second began
    lock                 held (flock) by the process that drives the run, with its pid inside
    writing              held by rank 0 while it lives

Both locks end with their process, however it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from cluster.errors import JobError
from train_jobs.runs import RunDir
from train_jobs.watch import clear

LOOK_S = 1.0
WRITER_S = 60.0
"""How long a new rank 0 waits for the one before it to be gone."""


@dataclass(frozen=True)
class Attempt:
    """One job that works on a run, or one set of plain processes."""

    number: int
    """From 1."""
    submission: str | None
    """Ray's id of the job; None for plain processes."""
    started: float
    """Seconds since the epoch."""

    def name(self, run: RunDir) -> str:
        """Return a name that no other attempt has: Ray Train resumes equal ones in silence."""
        return name_of(run, self.number)


def name_of(run: RunDir, number: int) -> str:
    """Return the name of an attempt: the run's own for the first, ``...-r2`` for the second."""
    return run.id if number == 1 else f"{run.id}-r{number}"


def begin(run: RunDir, submission: Callable[[str], str | None]) -> Attempt:
    """Write the next attempt down; ``submission`` turns its name into Ray's id for it.

    The result of the attempt before is put aside; what ended it, and a request to stop, are
    forgotten.
    """
    folder = run.path / "attempts"
    folder.mkdir(exist_ok=True)
    number = len(history(run)) + 1
    while True:
        attempt = Attempt(number, submission(name_of(run, number)), round(time.time(), 3))
        try:
            with (folder / f"{number}.json").open("x") as file:
                file.write(json.dumps(asdict(attempt)) + "\n")
        except FileExistsError:
            number += 1
            continue
        break
    if run.result.exists():
        os.replace(run.result, folder / f"{number - 1}.result")
    run.stop.unlink(missing_ok=True)
    clear(run.pulses)
    return attempt


def history(run: RunDir) -> list[Attempt]:
    """Return all attempts, oldest first."""
    found = []
    for path in (run.path / "attempts").glob("*.json"):
        try:
            found.append(Attempt(**json.loads(path.read_text())))
        except (ValueError, TypeError):
            continue  # being written at this moment
    return sorted(found, key=lambda attempt: attempt.number)


def join(run: RunDir, submission: str | None, resume: bool) -> Attempt:
    """Return the attempt that the calling process is: one that was written down for it, or a new.

    Raises:
        JobError: somebody else's run, and not ``resume``.
    """
    known = history(run)
    mine = next((a for a in known if submission and a.submission == submission), None)
    if mine is None and known and not resume:
        raise JobError(
            f"run {run.id} was started before ({run.path}); go on with `roundhouse train --resume "
            f"{run.id}`, or start a new one with your own config file"
        )
    return mine or begin(run, lambda _: submission)


@contextmanager
def claim(run: RunDir) -> Iterator[None]:
    """Drive the run: hold its lock. JobError when another process does."""
    with _open(run.path / "lock") as file:
        deadline = time.monotonic() + LOOK_S  # somebody who looks holds it for a moment
        while not _lock(file):
            if time.monotonic() > deadline:
                raise still_running(run)
            time.sleep(0.05)
        _sign(file)
        yield


def still_running(run: RunDir) -> JobError:
    """Return the error for a run that somebody drives."""
    holder = driver(run) or {}
    who = f" (process {holder['pid']} on {holder['host']})" if holder else ""
    return JobError(
        f"run {run.id} is still running{who}; follow it with `roundhouse jobs logs --follow "
        f"{run.id}`, or end it with `roundhouse jobs stop {run.id}`"
    )


def is_driven(run: RunDir) -> bool:
    """Say whether a process drives the run now."""
    try:
        with (run.path / "lock").open() as file:
            return not _lock(file)
    except FileNotFoundError:
        return False


def is_driven_elsewhere(run: RunDir) -> bool:
    """Say whether a process other than this one drives the run: its result is not ours to say."""
    return is_driven(run) and (driver(run) or {}).get("pid") != os.getpid()


def driver(run: RunDir) -> dict[str, Any] | None:
    """Return ``pid`` and ``host`` of whoever drives, or drove last."""
    try:
        found: dict[str, Any] = json.loads((run.path / "lock").read_text())
    except (OSError, ValueError):
        return None
    return found


@contextmanager
def writer(run: RunDir, rank: int) -> Iterator[None]:
    """Be the only rank 0 of the run: wait, within bounds, until the one before is gone.

    Raises:
        JobError: it still lives.
    """
    if rank:
        yield
        return
    deadline = time.monotonic() + WRITER_S
    with _open(run.path / "writing") as file:
        while not _lock(file):
            if time.monotonic() > deadline:
                raise JobError(
                    f"run {run.id}: another rank 0 still holds {run.path / 'writing'} after "
                    f"{WRITER_S:.0f} s; end that process, then try again"
                )
            time.sleep(0.2)
        _sign(file)
        yield


def _sign(file: IO[str]) -> None:
    """Write into a lock who holds it."""
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    file.flush()


def _open(path: Path) -> IO[str]:
    return path.open("a+")


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def terminate(run: RunDir) -> None:
    """Ask the process of this machine that drives the run to end.

    Raises:
        JobError: it runs on another machine.
    """
    found = driver(run) or {}
    if found.get("host") != socket.gethostname():
        raise JobError(
            f"run {run.id} is driven by process {found.get('pid')} of {found.get('host')}; end it "
            "there, or start the cluster that it belongs to"
        )
    if is_driven(run):  # so that the pid is still that process's
        os.kill(found["pid"], signal.SIGTERM)
