"""One run's folder: ``runs/<id>/`` with config.json, metrics.jsonl, checkpoints/, result.json."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import home
from cluster.errors import ConfigError

TAIL_BYTES = 65536


def new_id(stem: str, now: datetime | None = None, tail: str | None = None) -> str:
    """Return an id nobody has used, as in ``demo-sft-20261122-0101-ab12`` (UTC).

    Ids must be unique: Ray Train resumes a run whose name it has seen, without a word.
    """
    word = "".join(c if c.isascii() and c.isalnum() else "-" for c in stem.lower()).strip("-")
    stamp = (now or datetime.now(UTC)).strftime("%Y%m%d-%H%M")
    return f"{word[:24].strip('-') or 'run'}-{stamp}-{tail or secrets.token_hex(2)}"


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Only rank 0 and the driver write; anybody may read."""

    path: Path

    @classmethod
    def create(cls, stem: str) -> RunDir:
        """Make the folder of a new run under ``<home>/runs``."""
        for _ in range(8):
            path = home.runs_dir() / new_id(stem)
            try:
                path.mkdir(parents=True, mode=0o700)
            except FileExistsError:
                continue
            return cls(path)
        raise FileExistsError(f"eight run ids in a row were taken under {home.runs_dir()}")

    @classmethod
    def of(cls, config: Path) -> RunDir | None:
        """Return the run that a stored ``config.json`` belongs to, or None for a user's file."""
        path = config.absolute()
        return cls(path.parent) if path.parent.parent == home.runs_dir() else None

    @classmethod
    def find(cls, name: str) -> RunDir:
        """Return the run of that id; ConfigError names those there are."""
        known = every()
        for run in known:
            if run.id == name:
                return run
        newest = ", ".join(run.id for run in known[:5])
        raise ConfigError(
            f"no run {name!r:.80}; "
            + (f"the newest are {newest}" if newest else f"{home.runs_dir()} holds no run yet")
        )

    @property
    def id(self) -> str:
        """Its name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration: what the workers read."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: a step, or an event."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """Written once, at the end, whatever the end was."""
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of `train_jobs.checkpoint`."""
        return self.path / "checkpoints"

    @property
    def reshaped(self) -> Path:
        """Where a checkpoint of another number of ranks lies while it is read."""
        return self.path / "reshaped"

    @property
    def pulses(self) -> Path:
        """Folder of `train_jobs.watch`: a file of each rank, and why the ranks were ended."""
        return self.path / "pulses"

    @property
    def stop(self) -> Path:
        """Its existence asks the run to end after the step it is in."""
        return self.path / "stop"

    def without_checkpoint(self, passed: Sequence[str] = ()) -> str:
        """Return why the run cannot go on, and what to do instead."""
        torn = f" ({'; '.join(passed)})" if passed else ""
        return (
            f"run {self.id} has no whole checkpoint in {self.checkpoints}{torn}; start it anew "
            f"with `roundhouse train {self.config}`, and set run.save_every so that the next one "
            "has some"
        )

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``; a reader sees whole lines only.

        One that does not fit on the disk is left out, with a word on the standard error: a run
        does not end for its telemetry.
        """
        line = json.dumps({"time": round(time.time(), 3), **record}).encode() + b"\n"
        with self.metrics.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                fits = file.write(line) == len(line)
            except OSError:
                fits = False
            if not fits:
                file.truncate(before)  # half a line would end the ones that can be read
                sys.stderr.write(f"{self.metrics}: no room for a line: {line.decode()}")

    def mend_metrics(self) -> None:
        """Cut off a last line that a killed rank 0 did not finish."""
        try:
            size = self.metrics.stat().st_size
        except FileNotFoundError:
            return
        if (whole := self.metrics_end()) < size:
            os.truncate(self.metrics, whole)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json`` by rename."""
        staged = self.result.with_suffix(".partial")
        staged.write_text(json.dumps({"run": self.id, **result}, indent=2) + "\n")
        os.replace(staged, self.result)

    def fail(self, why: str) -> None:
        """Write down why the run failed; where there is no room for it, on the standard error."""
        try:
            self.finish({"status": "failed", "error": why})
        except OSError as error:
            sys.stderr.write(f"{self.result}: {error.strerror}: the run failed: {why}\n")

    def read_result(self) -> dict[str, Any] | None:
        """Return ``result.json``, or None while the run has none."""
        try:
            found: dict[str, Any] = json.loads(self.result.read_text())
        except FileNotFoundError:
            return None
        return found

    def last_step(self) -> dict[str, Any] | None:
        """Return the newest record of a step, looking at the end of the file only."""
        try:
            start = max(0, self.metrics.stat().st_size - TAIL_BYTES)
            with self.metrics.open("rb") as file:
                file.seek(start)
                lines = file.read().splitlines(keepends=True)[1 if start else 0 :]
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            record: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
            if "step" in record and "steps" in record and "event" not in record:
                return record
        return None

    def metrics_end(self) -> int:
        """Return the offset behind the last whole line so far."""
        return max((end for _, end in self.read_metrics()), default=0)

    def read_metrics(self, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield each whole line from byte ``offset`` on, with the offset behind it."""
        try:
            file = self.metrics.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield json.loads(line), offset


def every() -> list[RunDir]:
    """Return all runs, the newest first."""
    # the configuration is written once, when the run is made
    found = [(path.stat().st_mtime, path.parent) for path in home.runs_dir().glob("*/config.json")]
    return [RunDir(path) for _, path in sorted(found, reverse=True)]
