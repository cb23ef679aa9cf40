"""``--local N``: the same ranks as plain processes of this machine, without Ray."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cluster.package import code_root
from train_jobs.group import Place, free_address
from train_jobs.runs import RunDir
from train_jobs.watch import wrong

if TYPE_CHECKING:
    from train_jobs.follow import State

GRACE_S = 10.0


class LocalRanks:
    """The processes of one run; what each of them printed is in ``rank-N.log``."""

    def __init__(self, run: RunDir, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        self.run, self.ranks = run, ranks
        self._failed: int | None = None

    @classmethod
    def start(
        cls, run: RunDir, workers: int, resume: bool = False, module: str = "train_jobs.local"
    ) -> LocalRanks:
        """Start all ranks; they meet on a free port of the loopback.

        With ``resume`` they go on from the run's newest checkpoint, and must find one. ``module``
        is what each of them runs.
        """
        address = free_address()
        ranks = []
        for rank in range(workers):
            with _log(run, rank).open("ab" if resume else "wb") as log:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, str(run.path)]
                        + [str(rank), str(workers), address, *(["resume"] if resume else [])],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=code_root(),
                        # Ctrl-C is for whoever follows the run
                        start_new_session=True,
                    )
                )
        return cls(run, ranks)

    def state(self) -> State:
        """Return where the run stands; one rank that fails ends the others."""
        codes = [rank.poll() for rank in self.ranks]
        if all(code == 0 for code in codes):
            return "succeeded"
        if self._failed is None:
            self._failed = next((number for number, code in enumerate(codes) if code), None)
        if self._failed is None:
            return "running"
        self.kill()
        return "failed"

    def why(self) -> str:
        """Return what a rank found wrong, else the last words of the one that failed first."""
        if found := wrong(self.run.pulses):
            number, told = found
            return f"run {self.run.id}: rank {number} failed: {told}\n{self._whole(number)}"
        number = self._failed or 0
        text = _log(self.run, number).read_text(errors="replace").strip()
        code = self.ranks[number].returncode
        last = text.splitlines()[-1] if text else f"exit code {code}"
        if code is not None and code < 0:
            said = f"; its last words: {last}" if text else ""
            name = signal.Signals(-code).name
            last = f"it was ended by {name}, by somebody or for its memory{said}"
        return f"run {self.run.id}: rank {number} failed: {last}\n{self._whole(number)}"

    def _whole(self, number: int) -> str:
        return f"whole log: {_log(self.run, number)}"

    def kill(self) -> None:
        """End what still runs: TERM, then KILL."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.terminate()
        deadline = time.monotonic() + GRACE_S
        for rank in self.ranks:
            try:
                rank.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait(GRACE_S)

    def detach(self) -> None:
        """Plain processes end with the command that started them."""


def logs(run: RunDir) -> list[Path]:
    """Return what the ranks of plain processes wrote, rank by rank."""
    return sorted(run.path.glob("rank-*.log"))


def _log(run: RunDir, rank: int) -> Path:
    return run.path / f"rank-{rank}.log"


def die_with_parent() -> None:
    """Ask the kernel to end this rank when whoever follows the run is gone (Linux)."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        pr_set_pdeathsig = 1  # linux/prctl.h
        prctl(pr_set_pdeathsig, int(signal.SIGTERM))


def end(code: int) -> NoReturn:
    """End a rank whose work is written down, without taking the interpreter apart.

    Gloo's threads let go of the last collective's tensors whenever they get to it. Where that is
    after Python has begun to finish, they cannot take its lock, and the whole process aborts
    (pytorch pull request 179291): a rank that had done all of its work counted as one that failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: list[str]) -> int:
    """Be one rank: ``RUN_FOLDER RANK SIZE HOST:PORT [resume]``."""
    from cluster.errors import RoundhouseError
    from train_jobs.ports import PlainWorld
    from train_jobs.rank import run_rank

    die_with_parent()
    run, rank, size = RunDir(Path(argv[0])), int(argv[1]), int(argv[2])
    place = Place(rank, size, rank, size, argv[3])
    try:
        run_rank(run, place, PlainWorld(rank, size, run), None, resume="resume" in argv[4:])
    except RoundhouseError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    faulthandler.enable()  # a native fault leaves its stack in the rank's log
    end(main(sys.argv[1:]))
