"""What ends a run that goes nowhere: a rank that is silent, rows that do not come, a wild loss.

    pulses/0.json       rank 0: its last step, what it is doing, how often it said so
    pulses/ended.json   why the ranks were ended from here
    pulses/wrong.json   what a rank found wrong with the run, before it left

Ranks wait for each other in collectives, so one that is stuck stops them all, and none of them can
say which it was: a thread of each rank writes its pulse, and the threads of the first two read
those of all.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import JobError
from train_jobs.supervision import Diverge

PULSE_S = 1.0
SILENT = 5
"""Pulses that a process which has any CPU time does not miss."""
READERS = 2
"""The second reads for the case that the first is the one that is stuck."""
ENDED, WRONG = "ended.json", "wrong.json"
FLOOR = 0.5
"""Below this a loss may jump without running away."""

ADVICE = {
    "reading rows": "look at the disk or the network that data.train lies on",
    "forward": "raise run.stall_s if a micro-batch takes that long, or lower batch.micro",
    "backward": "raise run.stall_s if a micro-batch takes that long, or lower batch.micro",
    "preparing": "see whether whom the objective asks (a served model, a reward) still answers",
    "saving": "look at the disk that the run's folder lies on",
}


class Lost(JobError):
    """A rank is gone or stuck: nothing is wrong with the run, another attempt may well end it."""


@dataclass(frozen=True)
class Pulse:
    """What one rank says of itself."""

    rank: int
    step: int = 0
    """The optimiser step it is in, from 1; 0 before the first."""
    doing: str = "starting"
    count: int = 0
    """How often it went on to something new."""
    alive: int = 0
    """Written anew that often; stands still when the process is gone or stopped."""
    pid: int = 0
    host: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Heart:
    """A rank's pulse, and the watch over all of them, in a thread."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        stall_s: float,
        end: Callable[[str], None] | None = None,
        period_s: float = PULSE_S,
    ) -> None:
        """``end`` is called once with the reason; by default it ends this process."""
        self.folder, self.rank, self.size, self.stall_s = folder, rank, size, stall_s
        self.period_s = period_s
        self._end = end or leave
        self._pulse = Pulse(rank, pid=os.getpid(), host=socket.gethostname())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> Heart:
        """Begin to beat."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Beat no more, and watch no more."""
        self._over.set()
        self._thread.join(10 * self.period_s)

    def at(self, step: int, doing: str) -> None:
        """Note what this rank begins to do in optimiser step ``step`` (from 1). Costs nothing."""
        self._pulse = replace(self._pulse, step=step, doing=doing, count=self._pulse.count + 1)

    def suspects(self) -> list[Pulse]:
        """Return who holds the others up, as it looks over the next seconds."""
        earlier = self._read()
        self._over.wait(SILENT * self.period_s)
        return suspects(earlier, self._read())

    def _run(self) -> None:
        seen: dict[int, Pulse] = {}
        since = time.monotonic()
        history: deque[dict[int, Pulse]] = deque(maxlen=SILENT + 1)
        while not self._over.wait(self.period_s):
            try:
                self._write()
                told = ended(self.folder)
                now = self._read() if self.rank < READERS else {}
            except OSError as error:  # the folder is gone for a moment, or the disk is full
                sys.stderr.write(f"{self.folder}: {error}\n")
                continue
            history.append(now)
            if {r: p.count for r, p in now.items()} != {r: p.count for r, p in seen.items()}:
                seen, since = now, time.monotonic()
            if not told and self.rank < READERS and time.monotonic() - since > self.stall_s:
                told = claim(self.folder, stalled(suspects(history[0], now), self.stall_s))
            if told:
                self._end(told)
                return

    def _write(self) -> None:
        self._pulse = pulse = replace(self._pulse, alive=self._pulse.alive + 1)
        target = self.folder / f"{self.rank}.json"
        staged = target.with_suffix(".partial")
        staged.write_text(json.dumps(asdict(pulse)))
        os.replace(staged, target)

    def _read(self) -> dict[int, Pulse]:
        found = {}
        for rank in range(self.size):
            try:
                found[rank] = Pulse(**json.loads((self.folder / f"{rank}.json").read_text()))
            except FileNotFoundError:
                found[rank] = Pulse(rank)
        return found


def suspects(earlier: dict[int, Pulse], later: dict[int, Pulse]) -> list[Pulse]:
    """Return the pulses of those who hold the others up.

    Processes that have not moved at all; else those that are furthest behind, who may be all.
    """
    still = [
        pulse
        for rank, pulse in later.items()
        if rank in earlier and pulse.alive == earlier[rank].alive
    ]
    if still:
        return still
    least = min(pulse.count for pulse in later.values())
    return [pulse for pulse in later.values() if pulse.count == least]


def stalled(who: Sequence[Pulse], stall_s: float) -> str:
    """Return the sentence on ranks that hold a run up, and what to try."""
    first = who[0]
    names = " and ".join(str(pulse) for pulse in who[:4])
    more = f" and {len(who) - 4} more" if len(who) > 4 else ""
    advice = ADVICE.get(first.doing, "look at its machine, and at what else runs there")
    return (
        f"no progress for {stall_s:.0f} s (run.stall_s): {names}{more} in step {first.step}, "
        f"{first.doing}; {advice}"
    )


def claim(folder: Path, why: str) -> str:
    """Write down why the ranks are ended; the first reason stays, and is returned.

    Where it cannot be written (a full disk), this rank ends for its own reason all the same.
    """
    try:
        return why if _write_once(folder / ENDED, {"why": why}) else ended(folder) or why
    except OSError as error:
        sys.stderr.write(f"{folder / ENDED}: {error.strerror}\n")
        return why


def ended(folder: Path) -> str | None:
    """Return why the ranks were ended, if they were."""
    told = _read(folder / ENDED)
    return str(told["why"]) if told else None


def accuse(folder: Path, rank: int, why: str) -> None:
    """Write down what a rank found wrong with the run; the first to find something is kept.

    The others, who only lose contact with it, leave by themselves. Where it cannot be written, the
    standard error has it: what was wrong is not to be hidden by a full disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_once(folder / WRONG, {"rank": rank, "why": why})
    except OSError as error:
        sys.stderr.write(f"{folder / WRONG}: {error.strerror}: rank {rank} failed: {why}\n")


def wrong(folder: Path) -> tuple[int, str] | None:
    """Return which rank found what to be wrong; another attempt would find it, too."""
    told = _read(folder / WRONG)
    return (int(told["rank"]), str(told["why"])) if told else None


def _write_once(path: Path, told: dict[str, Any]) -> bool:
    # Not by process id: ranks of several machines meet in this folder, and threads of one process.
    staged = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    staged.write_text(json.dumps(told))
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    finally:
        staged.unlink(missing_ok=True)
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return told


def clear(folder: Path) -> None:
    """Forget an attempt before this one."""
    for path in folder.glob("*"):
        path.unlink(missing_ok=True)


def leave(why: str) -> None:
    """End this process at once: its main thread waits for somebody who does not come."""
    sys.stderr.write(f"{why}\n")
    sys.stderr.flush()
    os._exit(1)


class Losses:
    """Whether the loss runs away. Every rank sees the same losses, and decides alike."""

    def __init__(self, rule: Diverge | None) -> None:
        self.rule = rule
        self._good: deque[float] = deque(maxlen=rule.window if rule else 1)
        self._wild = 0

    @property
    def are_wild(self) -> bool:
        """Whether the last one was too large: nothing is saved then."""
        return self._wild > 0

    def add(self, step: int, loss: float) -> None:
        """Take the loss of optimiser step ``step``.

        Raises:
            JobError: the last ``rule.steps`` of them were too large.
        """
        if self.rule is None:
            return
        usual = max(FLOOR, statistics.median(self._good)) if self._good else None
        if usual is None or loss <= self.rule.times * usual:
            self._good.append(loss)
            self._wild = 0
            return
        self._wild += 1
        if self._wild >= self.rule.steps:
            raise JobError(
                f"step {step}: the loss runs away: {loss:.4g}, for {self._wild} steps more than "
                f"{self.rule.times:g} times the {usual:.4g} that were usual before (run.diverge); "
                "lower optim.lr or raise optim.warmup_ratio, and look at the rows of step "
                f"{step - self._wild + 1}. Checkpoints are from before"
            )
