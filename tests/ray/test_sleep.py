"""Two models and memory for one: who is asked for comes, who was not leaves, and nobody is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import requests

from cluster.keys import KeyStore
from cluster.library.manifest import Facts
from cluster.library.store import Library
from serve_apps.release_policy import WATCH_S
from tests.parity.adapter_fixtures import save_adapter
from tests.parity.engine_fixtures import save_tiny
from tests.ray.cluster_fixtures import Rig
from tests.unit.text_fixtures import write_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
CONFIG = """
models:
  - model: nap-a
    num_cpus: 0.25
    wake_s: 60
    adapters: [nap-lora]
    engine: &tiny {device: cpu, dtype: float32, max_model_len: 128, threads: 1}
  - model: nap-b
    num_cpus: 0.25
    wake_s: 0.5
    engine: *tiny
limits: {models_memory_gb: 0.6}
"""
"""A rank takes somewhat less than 0.6 GB, nearly all of it torch."""


@pytest.fixture(scope="module")
def nap(cluster: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    place = tmp_path_factory.mktemp("nap")
    save_tiny(place / "model", vocab_size=400)
    write_tokenizer(place / "model")
    for name in ("nap-a", "nap-b"):
        Library(cluster.home / "library").publish(name, place / "model", Facts())
    lora = save_adapter(place / "model", place / "lora", seed=3, size=2.0)
    facts = Facts(kind="adapter", base="nap-a@1")
    Library(cluster.home / "library").publish("nap-lora", lora, facts)
    (place / "serve.yaml").write_text(CONFIG)
    cluster.run("deploy", str(place / "serve.yaml"), "--timeout", "170", timeout_s=200)
    yield cluster
    for name in ("nap-a", "nap-b"):
        cluster.run("undeploy", name, check=False)


def ranks(rig: Rig) -> list[int]:
    """Return the resident bytes of every rank on this cluster."""
    found = []
    for process in psutil.process_iter(["name", "environ", "memory_info"]):
        told = process.info
        home = (told["environ"] or {}).get("ROUNDHOUSE_HOME")
        if home == str(rig.home) and str(told["name"]).startswith("ray::RankActor"):
            found.append(told["memory_info"].rss)
    return found


def asleep(rig: Rig) -> dict[str, bool]:
    told = call(rig, "GET", "/v1/models").json()["data"]
    return {one["id"]: one["asleep"] for one in told if one["id"] in ("nap-a", "nap-b")}


def call(
    rig: Rig, method: str, path: str, body: Any = None, key: str | None = None
) -> requests.Response:
    head = {"Authorization": f"Bearer {key or rig.api_key}"}
    url = f"{rig.cluster.serve_url}{path}"
    return requests.request(method, url, json=body, headers=head, timeout=90)


def ask(rig: Rig, name: str) -> requests.Response:
    body = {"model": name, "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
    return call(rig, "POST", "/v1/completions", body)


def until(rig: Rig, state: dict[str, bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while asleep(rig) != state or len(ranks(rig)) != list(state.values()).count(False):
        assert time.monotonic() < end, (asleep(rig), ranks(rig))
        time.sleep(0.3)


def told_whole(rig: Rig, seconds: float = 4 * WATCH_S) -> dict[str, Any]:
    """Return what status says once that is what the ranks take.

    They grow with their first request, and a replica says so within ``WATCH_S``.
    """
    end = time.monotonic() + seconds
    while True:
        held: dict[str, Any] = json.loads(rig.run("status", "--json").stdout)["in_memory"]
        if held["used_bytes"] == pytest.approx(sum(ranks(rig)), rel=0.1):
            return held
        assert time.monotonic() < end, (held, ranks(rig))


def counted(rig: Rig) -> dict[str, float]:
    """Return nap-a's metrics of sleep, as the gateway has them from Ray's pipeline."""
    found: dict[str, float] = {}
    for row in call(rig, "GET", "/metrics").text.splitlines():
        name, _, rest = row.removeprefix("ray_roundhouse_model_").partition("{")
        if 'model_name="nap-a"' in rest:
            found[name] = found.get(name, 0.0) + float(row.rpartition(" ")[2])
    return found


def test_RC12_of_two_models_with_memory_for_one_the_one_that_is_asked_for_is_there(
    nap: Rig,
) -> None:
    assert ask(nap, "nap-a").json()["system_fingerprint"] == "nap-a@1"
    until(nap, {"nap-a": False, "nap-b": True})
    assert sum(ranks(nap)) < 0.6e9
    held = told_whole(nap)
    takes = {m["name"]: m["memory_bytes"] for m in held["models"] if not m["asleep"]}
    assert held["budget_bytes"] == 600_000_000
    assert takes == {"nap-a": held["used_bytes"]}
    # nap-b waits half a second at most, which is too short; but it comes, and nap-a goes
    early = ask(nap, "nap-b")
    assert (early.status_code, early.json()["error"]["code"]) == (503, "model_asleep")
    assert int(early.headers["retry-after"]) >= 1
    end = time.monotonic() + 60
    while (answer := ask(nap, "nap-b")).status_code == 503:
        assert time.monotonic() < end, answer.text
        time.sleep(0.5)
    assert answer.json()["system_fingerprint"] == "nap-b@1"
    until(nap, {"nap-a": True, "nap-b": False})
    # nap-a's request waits, and is answered
    began = time.monotonic()
    assert ask(nap, "nap-a").json()["system_fingerprint"] == "nap-a@1"
    assert time.monotonic() - began < 60
    until(nap, {"nap-a": False, "nap-b": True})


def test_load_and_unload_by_the_command_line_and_by_an_admin_key(nap: Rig) -> None:
    nap.run("unload", "nap-a", "--timeout", "60")
    until(nap, {"nap-a": True, "nap-b": True})
    assert ranks(nap) == []
    nap.run("load", "nap-b", "--timeout", "60")
    until(nap, {"nap-a": True, "nap-b": False})
    path = "/admin/models/nap-b/unload"
    assert call(nap, "POST", path).status_code == 403
    admin = KeyStore(nap.home / "keys").add("keeper", admin=True)
    assert call(nap, "POST", "/admin/models/nix/unload", key=admin).status_code == 404
    told = call(nap, "POST", path, key=admin)
    assert (told.status_code, told.json()["id"]) == (202, "nap-b")
    until(nap, {"nap-a": True, "nap-b": True})
    assert call(nap, "POST", "/admin/models/nap-a/load", key=admin).status_code == 202
    until(nap, {"nap-a": False, "nap-b": True})


def test_RC12_a_model_comes_back_with_its_adapters(nap: Rig) -> None:
    def said(name: str) -> tuple[str, str]:
        told = ask(nap, name).json()
        return told["system_fingerprint"], told["choices"][0]["text"]

    before = counted(nap)
    base, adapted = said("nap-a"), said("nap-lora")
    assert (base[0], adapted[0]) == ("nap-a@1", "nap-lora@1")
    assert adapted[1] != base[1]
    for first in ("nap-lora", "nap-a"):  # whoever asks first wakes both
        nap.run("unload", "nap-a", "--timeout", "60")
        until(nap, {"nap-a": True, "nap-b": True})
        answers = {first: said(first)} | {"nap-a": said("nap-a"), "nap-lora": said("nap-lora")}
        assert answers == {"nap-a": base, "nap-lora": adapted}
    end = time.monotonic() + 60
    while True:  # seen a dozen seconds later
        now = counted(nap)
        woken = now["wakeups_total"] - before.get("wakeups_total", 0.0)
        if woken >= 2 and now["memory_bytes"] > 1e8:
            break
        assert time.monotonic() < end, (before, now)
        time.sleep(1)
    assert 0 < now["wakeup_seconds_total"] - before.get("wakeup_seconds_total", 0.0) < 240
