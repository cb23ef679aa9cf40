"""Tiers and guards for every test.

pytest              hermetic, no Ray, under a minute
pytest -m parity    tiny or real models, gloo ranks as plain processes, minutes of CPU
pytest -m ray       one local Ray cluster, started by the product's own verbs
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from cluster import console

# before anything imports a Hugging Face package: no test reaches a hub by accident
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# hypothesis fails an example that takes 200 ms: a busy machine is no error, and hangs are bounded
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(scope="session", autouse=True)
def _one_kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Build the native kernels once a session: each test has a home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail any connection of this process that would leave the machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise AssertionError(f"a test tried to reach {address[0]}: tests stay on loopback")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _answers_in_text() -> None:
    """Start as the command line does: `--json` of an earlier test is forgotten."""
    console.use_json(False)


@pytest.fixture(autouse=True)
def _own_home(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give each hermetic test a home of its own; cluster tests bring theirs."""
    if request.node.get_closest_marker("ray") is None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path / "roundhouse"))
