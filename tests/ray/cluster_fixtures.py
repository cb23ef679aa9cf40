"""One cluster for the whole tier, started and ended by the product's own verbs.

Use the fixture ``cluster`` (a :class:`Rig`); the first test that asks pays for the start.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import session
from cluster.session import Cluster

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Rig:
    """A home of its own and the verbs of the command line in it."""

    home: Path
    """ROUNDHOUSE_HOME. HOME is its parent."""
    ports: str = "any"
    said: str = ""
    """What ``up`` printed."""
    up_s: float = 0.0
    """Seconds that ``up`` took."""
    env: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        leave = {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"}
        kept = {name: value for name, value in os.environ.items() if name not in leave}
        self.env = kept | {
            "HOME": str(self.home.parent),
            "ROUNDHOUSE_HOME": str(self.home),
            "ROUNDHOUSE_PORTS": self.ports,
        }

    def command(self, *verb: str) -> list[str]:
        """Return the command line of one verb."""
        return [sys.executable, "-m", "cluster.cli", *verb]

    def run(
        self, *verb: str, timeout_s: float = 120.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run ``roundhouse VERB`` in the checkout; by default a failure fails the test."""
        ran = subprocess.run(
            self.command(*verb),
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and ran.returncode != 0:
            raise AssertionError(f"{verb} exited {ran.returncode}:\n{ran.stdout}\n{ran.stderr}")
        return ran

    def up(self) -> Rig:
        """Start the cluster."""
        began = time.monotonic()
        self.said = self.run("up", timeout_s=180).stdout
        self.up_s = time.monotonic() - began
        return self

    @property
    def api_key(self) -> str:
        """The demo key, in plain text."""
        return (self.home / "keys" / "demo.key").read_text().strip()

    @property
    def cluster(self) -> Cluster:
        """The cluster as it is written down now."""
        state = session.read_state(session.state_file(self.home))
        assert state is not None
        return session.from_state(state)


def new_rig(ports: str = "any") -> Rig:
    """Return a rig with an empty home on a short path."""
    return Rig(Path(tempfile.mkdtemp(prefix="rht-", dir="/tmp")) / "home", ports)


def discard(rig: Rig) -> None:
    """End the rig's cluster, and forget its home."""
    rig.run("down")
    shutil.rmtree(rig.home.parent)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Rig]:
    """The tier's cluster; ROUNDHOUSE_HOME and HOME of this process point to it meanwhile."""
    rig = new_rig()
    before = {name: os.environ.get(name) for name in ("HOME", "ROUNDHOUSE_HOME")}
    os.environ.update({"HOME": rig.env["HOME"], "ROUNDHOUSE_HOME": rig.env["ROUNDHOUSE_HOME"]})
    try:
        rig.up()
        yield rig
    finally:
        discard(rig)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
