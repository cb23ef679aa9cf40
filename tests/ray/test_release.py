"""Releases on a cluster, by the user's own verbs: one to the end, others that end early."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from cluster.library import releases as records
from cluster.library.manifest import Facts
from cluster.library.releases import Release
from cluster.library.store import Library
from serve_apps.config import GATEWAY_APP, model_app
from tests.ray.cluster_fixtures import Rig
from tests.unit.serving_fixtures import publish, write_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
HI: Any = [{"role": "user", "content": "Hi"}]
NAME = "relay"
CONFIG = """
models:
  - model: relay
    replicas: 2
    drain_s: 5
    engine: {kind: fake, token_delay_s: 0.01}
"""
PEOPLE = 40
ANY_SPEED: dict[str, Any] = {"ttft_p95": None, "tokens_per_s": None}
"""Gates for a release that is about something else: two cores stall now and then."""


@pytest.fixture(scope="module")
def relay(cluster: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Two replicas of ``relay@1``; in the library also ``relay@2`` to ``relay@7``, of which the
    fifth fails at its second token and the sixth is slow."""
    place = tmp_path_factory.mktemp("relay")
    library = Library(cluster.home / "library")
    publish(library, place, NAME, "a")
    library.move_alias(NAME, "champion", 1, None, "test")
    for mark in "bcd":
        publish(library, place, NAME, mark)
    for mark, faults in {"fails": {"fail_at_token": 2}, "slow": {"token_delay_s": 0.4}}.items():
        made = write_model(place / mark, mark)
        (made / "fake.json").write_text(json.dumps(faults))
        library.publish(NAME, made, Facts())
    publish(library, place, NAME, "e")
    config = place / "serve.yaml"
    config.write_text(CONFIG)
    cluster.run("deploy", str(config), "--timeout", "90")
    yield cluster
    cluster.run("undeploy", NAME, check=False)


class People(threading.Thread):
    """Asks again and again, each time as the next of its people; writes down who answered."""

    def __init__(self, rig: Rig, people: list[str]) -> None:
        super().__init__(daemon=True)
        self._api = openai.OpenAI(
            base_url=f"{rig.cluster.serve_url}/v1", api_key=rig.api_key, max_retries=0, timeout=60
        )
        self._people, self._end = people, threading.Event()
        self.max_tokens, self.turn = 3, 0
        self.said: list[tuple[str, str]] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._end.is_set():
            who = self._people[self.turn % len(self._people)]
            self.turn += 1
            try:
                told = self._api.chat.completions.create(
                    model=NAME, messages=HI, max_tokens=self.max_tokens, user=who
                )
                self.said.append((who, str(told.system_fingerprint)))
            except Exception as error:
                self.failures.append(repr(error))
                time.sleep(0.1)

    def finish(self) -> None:
        self._end.set()
        self.join(60)


@pytest.fixture
def crowd(relay: Rig) -> Iterator[list[People]]:
    """Three clients that speak for forty people between them."""
    clients = [People(relay, [f"p{n}" for n in range(k, PEOPLE, 3)]) for k in range(3)]
    for client in clients:
        client.start()
    yield clients
    for client in clients:
        client.finish()


def said(crowd: list[People]) -> list[tuple[str, str]]:
    return [one for client in crowd for one in client.said]


def library(rig: Rig) -> Library:
    return Library(rig.home / "library")


def last(rig: Rig) -> Release:
    return records.of(library(rig).root, NAME)[-1]


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def start(rig: Rig, tmp_path: Path, number: int, policy: dict[str, Any], *more: str) -> int:
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps(policy))
    ran = rig.run("release", "start", f"{NAME}@{number}", "--policy", str(path), *more, check=False)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode


def steps(*percents: float, gates: dict[str, Any] = ANY_SPEED, **more: Any) -> dict[str, Any]:
    return {"traffic": {"steps": [{"percent": p, **more} for p in percents]}, "gates": gates}


def settle(rig: Rig, crowd: list[People], gone: str = "") -> None:
    """Wait until whoever is answered from now on asked after the gateway had heard: of the share
    of a release that has begun, or that what was released is ``gone``; forget what was said."""
    url, head = f"{rig.cluster.serve_url}/v1/models", {"Authorization": f"Bearer {rig.api_key}"}

    def heard() -> bool:
        if not gone:
            return len({version for _, version in said(crowd)}) > 1
        told = requests.get(url, headers=head, timeout=30).json()["data"]
        return gone not in [ref for one in told if one["id"] == NAME for ref in one["live"]]

    if not gone:
        for client in crowd:
            client.said.clear()
    until(heard, "the gateway has heard")
    turns = [client.turn for client in crowd]
    until(
        lambda: all(client.turn > at + 1 for client, at in zip(crowd, turns, strict=True)),
        "what each asked before is answered",
    )
    for client in crowd:
        client.said.clear()


def test_RC05_T31_golden_prompts_that_fail_end_it_before_anybody_is_answered(
    relay: Rig, crowd: list[People], tmp_path: Path
) -> None:
    golden = [{"chat": "Hi", "regex": "."}, {"chat": "Where?", "contains": "in the shed"}]
    policy = steps(20, for_s=1, requests=5, gates={"golden": golden})
    assert start(relay, tmp_path, 2, policy, "--wait") == 1
    done = last(relay)
    assert [e.what for e in done.entries if e.what != "held"] == ["started", "rolled_back"]
    assert "'Where?' was answered" in done.entries[-1].why
    assert "'Hi'" not in done.entries[-1].why
    assert {version for _, version in said(crowd)} == {"relay@1"}
    assert [client.failures for client in crowd] == [[], [], []]
    assert library(relay).aliases(NAME)["champion"] == 1


def test_RC05_a_better_one_gets_its_share_and_then_the_place(
    relay: Rig, crowd: list[People], tmp_path: Path
) -> None:
    gates = ANY_SPEED | {"golden": [{"chat": "Hi", "regex": "."}]}
    policy = steps(30, for_s=3, requests=60, gates=gates) | {
        "shadow": {"percent": 50},
        "pace": "one",
    }
    policy["traffic"]["steps"].append({"percent": 100, "for_s": 0, "requests": 20})
    assert start(relay, tmp_path, 2, policy) == 0
    until(lambda: "advanced" in {e.what for e in last(relay).entries}, "the first step")
    api = openai.OpenAI(base_url=f"{relay.cluster.serve_url}/v1", api_key=relay.api_key)
    for pinned in ("relay@1", "relay@2"):
        told = api.chat.completions.create(model=pinned, messages=HI, max_tokens=2)
        assert told.system_fingerprint == pinned
    settle(relay, crowd)
    share: list[tuple[str, str]] = []
    while True:
        heard = said(crowd)
        if last(relay).moved.step != 0:
            break
        share = heard  # all of it is of the first step: the record is written before the share
        time.sleep(0.1)
    until(lambda: last(relay).over, "the end")
    assert last(relay).entries[-1].what == "promoted"
    time.sleep(0.3)
    final = said(crowd)[-1][1]
    for client in crowd:
        client.finish()
        assert client.failures == []
    assert final == "relay@2"
    assert library(relay).aliases(NAME)["champion"] == 2

    sides = {who: {v for other, v in share if other == who} for who, _ in share}
    assert all(len(versions) == 1 for versions in sides.values()), "each stays on one side"
    over = sum(versions == {"relay@2"} for versions in sides.values())
    assert len(sides) == PEOPLE
    assert 3 <= over <= 23, "binomial(40, 0.3) lies there but for once in 10,000 times"
    stepped = next(e for e in last(relay).entries if e.what == "advanced" and e.step == 1)
    assert stepped.seen["candidate"]["requests"] >= 40
    assert stepped.seen["candidate"]["shadows"] > 0


def conductor(rig: Rig) -> int | None:
    """Return the process of the Releases actor."""
    found = rig.cluster.json("GET", "/api/v0/actors?detail=1&limit=1000")
    rows = found["data"]["result"]["result"]
    alive = [r["pid"] for r in rows if r["name"] == "releases" and r["state"] == "ALIVE"]
    return int(alive[0]) if alive else None


def test_RC06_a_conductor_killed_in_the_middle_leaves_the_share_and_goes_on(
    relay: Rig, crowd: list[People], tmp_path: Path
) -> None:
    policy = steps(50, 100, for_s=1, requests=30)
    assert start(relay, tmp_path, 3, policy) == 0
    until(lambda: last(relay).moved.what == "advanced", "the first step")
    pid = conductor(relay)
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: last(relay).over, "the end")
    assert last(relay).entries[-1].what == "promoted"
    until(lambda: said(crowd)[-1][1] == "relay@3", "it answers")
    for client in crowd:
        client.finish()
        assert client.failures == []
    assert library(relay).aliases(NAME)["champion"] == 3
    assert conductor(relay) != pid


def test_RC06_an_error_rate_that_rises_ends_it_in_the_step_where_it_does(
    relay: Rig, crowd: list[People], tmp_path: Path
) -> None:
    before = library(relay).aliases(NAME)["champion"]
    for client in crowd:
        client.max_tokens = 1  # so short an answer does not fail
    policy = steps(50, for_s=0, requests=20)
    policy["traffic"]["steps"].append({"percent": 60, "for_s": 600})
    assert start(relay, tmp_path, 5, policy) == 0
    until(lambda: last(relay).moved.step == 1, "the second step")
    assert [client.failures for client in crowd] == [[], [], []]
    for client in crowd:
        client.max_tokens = 3
    until(lambda: last(relay).over, "the end")
    done = last(relay).entries[-1]
    assert (done.what, done.percent) == ("rolled_back", 0)
    assert "requests failed, of the champion's 0 of" in done.why
    assert done.seen["candidate"]["errors"] > 0
    assert library(relay).aliases(NAME)["champion"] == before
    settle(relay, crowd, gone="relay@5")
    for client in crowd:
        assert all("engine failed" in failure for failure in client.failures), client.failures
        client.failures.clear()
    until(lambda: len(said(crowd)) >= 2 * PEOPLE, "all are answered")
    assert {version for _, version in said(crowd)} == {f"relay@{before}"}
    assert [client.failures for client in crowd] == [[], [], []]


def test_RC06_first_tokens_that_come_late_end_it(
    relay: Rig, crowd: list[People], tmp_path: Path
) -> None:
    before = library(relay).aliases(NAME)["champion"]
    policy = steps(50, for_s=600, gates={"tokens_per_s": None})
    assert start(relay, tmp_path, 6, policy) == 0
    until(lambda: last(relay).over, "the end", 150)  # a champion that stalls, too, takes longer
    done = last(relay).entries[-1]
    assert done.what == "rolled_back"
    assert "the first token took" in done.why, done.why
    told = {side: done.seen[side]["ttft_p95_s"] for side in ("candidate", "champion")}
    assert told["candidate"] > max(0.4, 1.5 * told["champion"])
    assert library(relay).aliases(NAME)["champion"] == before
    for client in crowd:
        client.finish()
        assert client.failures == []


def processes(rig: Rig, app: str) -> list[int]:
    """Return the processes of an application's replicas."""
    apps = rig.cluster.json("GET", "/api/serve/applications/")["applications"]
    found = [r for d in apps[app]["deployments"].values() for r in d["replicas"]]
    return [r["pid"] for r in found if r["state"] == "RUNNING"]


def sides(crowd: list[People]) -> dict[str, set[str]]:
    heard = said(crowd)
    return {who: {v for other, v in heard if other == who} for who, _ in heard}


def test_RC06_a_gateway_killed_in_the_middle_of_a_step_keeps_everybody_on_their_side(
    relay: Rig, crowd: list[People], tmp_path: Path
) -> None:
    old = f"relay@{library(relay).aliases(NAME)['champion']}"
    policy = steps(50, for_s=1, requests=250)
    assert start(relay, tmp_path, 7, policy) == 0
    until(lambda: last(relay).moved.what == "advanced", "the step")
    settle(relay, crowd)
    until(lambda: len(sides(crowd)) == PEOPLE, "everybody is answered once")
    (pid,) = processes(relay, GATEWAY_APP)
    before = sides(crowd)
    os.kill(pid, signal.SIGKILL)
    until(lambda: processes(relay, GATEWAY_APP) not in ([], [pid]), "Serve restarts it")
    for client in crowd:
        client.said.clear()
    until(lambda: len(sides(crowd)) == PEOPLE, "everybody is answered again")
    after = sides(crowd)
    assert last(relay).moved.step == 0, "the step goes on, so the sides are the step's"
    assert set.union(*before.values()) == {old, "relay@7"}
    assert after == before
    lost = [len(client.failures) for client in crowd]
    until(lambda: last(relay).over, "the end")
    assert [e.what for e in last(relay).entries if e.what != "held"] == [
        "started", "advanced", "promoting", "promoted",
    ]  # fmt: skip
    assert library(relay).aliases(NAME)["champion"] == 7
    assert [len(client.failures) for client in crowd] == lost


def test_RC06_a_replica_that_dies_in_the_middle_ends_it(
    relay: Rig, crowd: list[People], tmp_path: Path
) -> None:
    champion = library(relay).aliases(NAME)["champion"]
    policy = steps(20, for_s=600, requests=0, gates=ANY_SPEED | {"errors": None})
    assert start(relay, tmp_path, 4, policy) == 0
    until(lambda: last(relay).moved.what == "advanced", "the first step")
    os.kill(processes(relay, model_app(NAME))[0], signal.SIGKILL)
    until(lambda: last(relay).over, "the end")
    done = last(relay)
    assert done.entries[-1].what == "rolled_back"
    assert "died while relay@4 answered 20 %" in done.entries[-1].why
    assert library(relay).aliases(NAME)["champion"] == champion
    told = json.loads(relay.run("release", "status", NAME, "--json").stdout)
    assert told["releases"][0]["entries"][-1]["what"] == "rolled_back"
