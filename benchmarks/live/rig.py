"""A cluster of the benchmark's own, the model in its library, and versions to put on its shelf."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.env import ROOT
from benchmarks.load import Endpoint, LoadError
from benchmarks.peers.environments import BASE
from benchmarks.servers import READY_S, wait_for

NAME = "live"
NOISE = 0.002
"""Spread of what is added to each weight: another version, that still speaks."""


class Rig:
    """``with Rig(model) as rig``: the cluster is up, and down again afterwards."""

    def __init__(self, model: Path) -> None:
        self.model, self.home = model, BASE / "live-home"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Rig:
        shutil.rmtree(self.home, ignore_errors=True)  # versions are counted from the first one
        self.home.mkdir(parents=True)
        self.verb("up", "--port", "any")
        self.verb("models", "import", str(self.model), "--name", NAME)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()  # it owns nothing: what it put belongs to the shelf
            self._process.wait(30)
        self.verb("down")

    @property
    def environ(self) -> Mapping[str, str]:
        """What every process of the rig has."""
        return os.environ | {"ROUNDHOUSE_HOME": str(self.home)}

    def verb(self, *args: str) -> dict[str, Any]:
        """Run a verb of the product; its result."""
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", *args, "--json"],
            cwd=ROOT, env=self.environ, stdout=subprocess.PIPE, text=True, timeout=READY_S,
        )  # fmt: skip
        if done.returncode:
            raise LoadError(f"`roundhouse {' '.join(args)}` ended with {done.returncode}")
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    @contextlib.contextmanager
    def deployed(
        self, replicas: int, streams: int, weights: str = "packed", **more: Any
    ) -> Iterator[Endpoint]:
        """Serve the model under its newest version; take it away again afterwards."""
        engine = {
            "max_model_len": 512,
            "max_concurrent": max(4, streams),
            "threads": max(1, (os.cpu_count() or 1) // replicas),
            "dtype": "float32",
            "weights": weights,
            **more,
        }
        model = {"model": f"{NAME}@live", "replicas": replicas, "num_cpus": 0.5, "engine": engine}
        config = BASE / "live.yaml"
        config.write_text(json.dumps({"models": [model]}))
        told = self.verb("deploy", str(config))
        key = Path(told["key_file"]).read_text().strip()
        endpoint = Endpoint(told["endpoint"], NAME, key)
        wait_for(endpoint, lambda: None)
        yield endpoint
        self.verb("undeploy", NAME)

    def shelf(self, **question: Any) -> dict[str, Any]:
        """Ask the process that belongs to the cluster, as a trainer does; see `publisher`."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.live.publisher", str(self.model)],
                cwd=ROOT, env=self.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, start_new_session=True,
            )  # fmt: skip
            self._read()
        assert self._process.stdin
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                told: dict[str, Any] = json.loads(line)
                return told
        raise LoadError("the publisher ended")

    def rank_rss(self) -> float:
        """Return the resident MiB of all ranks, fronts and shelf agents, less the object store.

        The store lies in memory that is mapped by all of them, and that each has used more of the
        longer it runs; it has a figure of its own.
        """
        from cluster.local import home_id
        from cluster.processes import of_home

        total = 0
        for found in of_home(home_id(self.home)):
            if any(word in found.name for word in ("RankActor", "Replica", "NodeAgent")):
                sizes = mappings(found.pid, "Rss")
                total += sum(size for name, size in sizes if "plasma" not in name)
        return total / 2**20


def mappings(pid: int, field: str) -> Iterator[tuple[str, int]]:
    """Yield name and bytes of each mapping of a process, as ``field`` of smaps (``Pss``) has it."""
    name = ""
    with contextlib.suppress(OSError):  # it has just ended
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            key, *rest = line.split()
            if key == f"{field}:":
                yield name, int(rest[0]) * 1024
            elif not key.endswith(":"):
                name = " ".join(rest[4:])
