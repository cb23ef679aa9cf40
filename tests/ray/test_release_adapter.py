"""A release of an adapter on a cluster, by the user's own verbs, while its people ask."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.library import releases as records
from cluster.library.store import Library
from tests.ray.cluster_fixtures import Rig
from tests.unit.adapter_fixtures import put
from tests.unit.serving_fixtures import publish

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
BASE, NAME = "signal", "signal-red"
CONFIG = f"""
models:
  - model: {BASE}
    replicas: 2
    adapters: [{NAME}]
    engine: {{kind: fake, token_delay_s: 0.01}}
"""
POLICY = """
traffic:
  steps: [{percent: 50, for_s: 0, requests: 10}, {percent: 100, for_s: 0, requests: 5}]
gates: {ttft_p95: null, tokens_per_s: null}
"""


@pytest.fixture(scope="module")
def signal(cluster: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Two replicas of ``signal@1`` with an adapter, and three versions of that in the library."""
    place = tmp_path_factory.mktemp("signal")
    library = Library(cluster.home / "library")
    publish(library, place, BASE, "a")
    for mark in range(3):
        put(library, place, NAME, f"{BASE}@1", mark)
    library.move_alias(NAME, "champion", 1, None, "test")
    (place / "serve.yaml").write_text(CONFIG)
    (place / "unknown.yaml").write_text(CONFIG.replace(f"[{NAME}]", "[signal-blue]"))
    (place / "policy.yaml").write_text(POLICY)
    refused = cluster.run("deploy", str(place / "unknown.yaml"), check=False)
    assert refused.returncode != 0
    assert "or write signal-blue@live" in refused.stderr
    cluster.run("deploy", str(place / "serve.yaml"), "--timeout", "120", timeout_s=150)
    yield cluster
    cluster.run("undeploy", BASE, check=False)


class People(threading.Thread):
    """Asks for the adapter again and again, as one of ten people after the other."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(daemon=True)
        self._api = openai.OpenAI(
            base_url=f"{rig.cluster.serve_url}/v1", api_key=rig.api_key, max_retries=0, timeout=60
        )
        self._end = threading.Event()
        self.said: list[tuple[str, str]] = []
        self.failures: list[str] = []

    def ask(self, model: str, who: str = "") -> str:
        asked: Any = [{"role": "user", "content": "Hi"}]
        told = self._api.chat.completions.create(
            model=model, messages=asked, max_tokens=3, user=who
        )
        return str(told.system_fingerprint)

    def run(self) -> None:
        turn = 0
        while not self._end.is_set():
            who = f"p{turn % 10}"
            turn += 1
            try:
                self.said.append((who, self.ask(NAME, who)))
            except Exception as error:
                self.failures.append(repr(error))

    def finish(self) -> None:
        self._end.set()
        self.join(60)


def test_RC05_an_adapters_release_goes_to_its_end_and_leaves_the_base_alone(
    signal: Rig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    policy = Path(tmp_path_factory.mktemp("policy")) / "policy.yaml"
    policy.write_text(POLICY)
    people = People(signal)
    people.start()
    until = time.monotonic() + 60
    while not people.said:
        assert time.monotonic() < until, people.failures
        time.sleep(0.05)
    ran = signal.run(
        *("release", "start", f"{NAME}@2", "--policy", str(policy), "--wait", "--json"),
        timeout_s=150,
    )
    people.finish()
    assert json.loads(ran.stdout)["entries"][-1]["what"] == "promoted"
    assert people.failures == []
    refs = [ref for _, ref in people.said]
    assert set(refs) == {f"{NAME}@1", f"{NAME}@2"}
    for who in {who for who, _ in people.said}:
        mine = [ref for one, ref in people.said if one == who]
        assert mine == sorted(mine), "people come over and none goes back"
    done = records.of(Library(signal.home / "library").root, NAME)[-1]
    moved = [entry.what for entry in done.entries if entry.what != "held"]
    assert moved == ["started", "advanced", "advanced", "promoting", "promoted"]
    assert people.ask(NAME) == f"{NAME}@2"
    assert people.ask(f"{NAME}@1") == f"{NAME}@1"
    assert people.ask(BASE) == f"{BASE}@1"
