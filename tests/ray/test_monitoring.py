"""Numbers on a cluster: exact at the gateway, in every panel by Prometheus, without secrets."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from cluster import processes
from cluster.library.store import Library
from cluster.monitoring import server
from cluster.monitoring.board import ROWS
from cluster.processes import Proc
from cluster.session import runtime_env, upload_code
from tests.ray.cluster_fixtures import Rig
from tests.unit.serving_fixtures import publish

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NAME, NAPPING = "measured", "napping"
PROMPT = "canary-of-the-prompt-7f3a"
SERVE = f"""
models:
  - model: {NAME}
    drain_s: 2
    engine: {{kind: fake, token_delay_s: 0.01, max_concurrent: 2}}
  - model: {NAPPING}
    idle_s: 4
    engine: {{kind: fake}}
"""
SEEN_S = 150.0
"""Ray passes numbers on every 10 s, Prometheus asks every 10 s, and a rate needs two answers."""
ONLY_WHEN_IT_FAILS = {"Server errors", "Answers that did not end", "GPU"}
"""Panels whose zero is made, and means that nothing failed (or that there is no GPU)."""
TRAINER = """
import sys, time
from pathlib import Path
import cluster.session as session
session.connect()
from train_jobs.ports import RayWorld
from train_jobs.runs import RunDir
world = RayWorld(0, 1, RunDir(Path(sys.argv[1])))
world.report({"event": "evaluated", "when": "before", "loss": 3.0, "accuracy": 0.4})
world.report({"event": "checkpoint", "step": 0, "path": "nowhere"})
for step in range(1, 300):
    world.report({"step": step, "steps": 300, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5,
        "tokens_per_s": 90.0, "trained_tokens": 40, "step_s": 1.0, "eta_s": 10.0, "accuracy": 0.5})
    time.sleep(1)
"""


class Load(threading.Thread):
    """A client that streams until it is told to end, and counts the tokens that it got."""

    def __init__(self, rig: Rig, key: str, model: str = NAME, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self._model, self._pause_s = model, pause_s
        self._url, self._key = f"{rig.cluster.serve_url}/v1/chat/completions", key
        self._end = threading.Event()
        self.tokens = self.answers = 0
        self.failures: list[str] = []

    def run(self) -> None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 8,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        while not self._end.is_set():
            head = {"Authorization": f"Bearer {self._key}"}
            try:
                answer = requests.post(self._url, json=body, headers=head, timeout=60)
                last = answer.text.strip().split("\n\n")[-2].removeprefix("data: ")
                self.tokens += json.loads(last)["usage"]["completion_tokens"]
                self.answers += 1
            except Exception as error:
                self.failures.append(repr(error))
                return
            self._end.wait(self._pause_s)

    def finish(self) -> None:
        self._end.set()
        self.join(60)


@pytest.fixture(scope="module")
def measured(cluster: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The cluster with a model that answers, and one that sleeps when nobody asks for it."""
    place = tmp_path_factory.mktemp("monitoring")
    library = Library(cluster.home / "library")
    for name in (NAME, NAPPING):
        publish(library, place, name)
        library.move_alias(name, "champion", 1, None, "test")
    (place / "serve.yaml").write_text(SERVE)
    cluster.run("deploy", str(place / "serve.yaml"), "--timeout", "90")
    yield cluster
    for name in (NAME, NAPPING):
        cluster.run("undeploy", name, check=False)


@pytest.fixture(scope="module")
def key(measured: Rig) -> str:
    """An API key that nobody else uses."""
    value: str = json.loads(measured.run("keys", "add", "monitoring", "--json").stdout)["key"]
    return value


@pytest.fixture(scope="module")
def load(measured: Rig, key: str) -> Iterator[list[Load]]:
    """Three clients, for two places in the engine: one waits."""
    clients = [Load(measured, key) for _ in range(3)]
    for client in clients:
        client.start()
    yield clients
    for client in clients:
        client.finish()


@pytest.fixture(scope="module")
def sleeper(measured: Rig, key: str) -> Iterator[None]:
    """Somebody who asks so seldom that the model falls asleep in between."""
    client = Load(measured, key, NAPPING, pause_s=20)
    client.start()
    yield
    client.finish()
    assert client.failures == []


@pytest.fixture(scope="module")
def training(measured: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A job of the shipped code that reports steps as rank 0 does, without a model."""
    place = tmp_path_factory.mktemp("training")
    run = measured.home / "runs" / "reported"
    run.mkdir(parents=True)
    config = {"model": f"{NAME}@1", "data": {"train": str(place / "x.jsonl")}, "run": {"steps": 1}}
    (run / "config.json").write_text(json.dumps(config))
    (place / "trainer.py").write_text(TRAINER)
    state = measured.cluster
    job = {
        "entrypoint": f"python {place / 'trainer.py'} {run}",
        "runtime_env": runtime_env(upload_code(state), {}),
    }
    name = state.json("POST", "/api/jobs/", json=job)["submission_id"]
    yield
    state.json("POST", f"/api/jobs/{name}/stop")
    until(lambda: state.json("GET", f"/api/jobs/{name}")["status"] == "STOPPED", 60)


@pytest.fixture(scope="module")
def prometheus(measured: Rig) -> Iterator[str]:
    """The URL of a Prometheus that `monitor up` started for the cluster."""
    if shutil.which(server.PROGRAM) is None:
        pytest.skip("prometheus is not on PATH (Debian: apt-get install prometheus)")
    said = json.loads(measured.run("monitor", "up", "--port", "0", "--json").stdout)
    running = server.running(measured.home)
    assert running
    yield said["prometheus"]
    assert processes.end([Proc(running.pid, running.born, "prometheus")]) == []


def until(condition: Any, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.5)


def scrape(rig: Rig, key: str) -> str:
    head = {"Authorization": f"Bearer {key}"}
    answer = requests.get(f"{rig.cluster.serve_url}/metrics", headers=head, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.text


def total(text: str, name: str) -> float:
    """Return the sum of a counter over all its series of our model."""
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if f'"{NAME}"' in line)


def ask(url: str, expr: str) -> list[float]:
    expr = expr.replace("$model", ".*").replace("$__rate_interval", "1m")
    answer = requests.get(f"{url}/api/v1/query", params={"query": expr}, timeout=30).json()
    assert answer["status"] == "success", (expr, answer)
    return [float(one["value"][1]) for one in answer["data"]["result"]]


@pytest.mark.usefixtures("load", "sleeper", "training")
def test_every_panel_shows_data_through_a_real_prometheus(prometheus: str) -> None:
    missing = {
        f"{panel.title}: {query.legend}": query.expr
        if panel.title in ONLY_WHEN_IT_FAILS
        else query.expr.replace(" or vector(0)", "")
        for row in ROWS
        for panel in row.panels
        for query in panel.queries
    }
    deadline = time.monotonic() + SEEN_S
    while missing:
        assert time.monotonic() < deadline, f"no data: {json.dumps(missing, indent=1)}"
        for what, expr in list(missing.items()):
            if any(value == value for value in ask(prometheus, expr)):  # NaN is no data
                del missing[what]
        time.sleep(1)
    # three targets, found behind the token
    assert ask(prometheus, 'up{job="roundhouse"}') == [1, 1, 1]
    rules = requests.get(f"{prometheus}/api/v1/rules", timeout=30).json()["data"]["groups"]
    held = {rule["name"]: (rule["health"], rule["state"]) for rule in rules[0]["rules"]}
    assert {health for health, _ in held.values()} == {"ok"}
    firing = [name for name, (_, state) in held.items() if state == "firing"]
    assert firing == [], "nothing is wrong here"


def test_prometheus_listens_on_loopback_and_down_will_end_it(
    measured: Rig, prometheus: str
) -> None:
    assert prometheus.startswith("http://127.0.0.1:")
    running = server.running(measured.home)
    assert running
    assert f"would end pid {running.pid} (prometheus)" in measured.run("down", "--dry-run").stdout
    again = json.loads(measured.run("monitor", "up", "--json").stdout)
    assert (again["prometheus"], again["pid"]) == (prometheus, running.pid)
    # whoever has no token gets no targets
    found = f"{measured.cluster.dashboard}/api/prometheus/sd"
    assert requests.get(found, timeout=30).status_code == 401


def test_counters_are_exact_and_the_gateway_shows_ours_alone(
    measured: Rig, load: list[Load], key: str
) -> None:
    assert requests.get(f"{measured.cluster.serve_url}/metrics", timeout=30).status_code == 401
    until(lambda: sum(client.answers for client in load) >= 20, 60)
    for client in load:
        client.finish()
    assert [client.failures for client in load] == [[], [], []]
    tokens, answers = sum(c.tokens for c in load), sum(c.answers for c in load)

    def arrived() -> bool:
        text = scrape(measured, key)
        return total(text, "ray_roundhouse_generation_tokens_total") >= tokens

    until(arrived, 60)
    text = scrape(measured, key)
    assert total(text, "ray_roundhouse_generation_tokens_total") == tokens
    assert total(text, "ray_roundhouse_request_success_total") == answers
    assert total(text, "ray_roundhouse_time_to_first_token_seconds_count") == answers
    assert total(text, "ray_roundhouse_inter_tokens_total") == tokens - answers
    names = {re.split(r"[{ ]", line.removeprefix("# HELP ").removeprefix("# TYPE "))[0]
             for line in text.splitlines()}  # fmt: skip
    assert all(name.startswith("ray_roundhouse_") for name in names), names
    assert "127.0.0.1" not in text


def test_T07_no_secret_is_in_any_metric(measured: Rig, load: list[Load], key: str) -> None:
    assert sum(client.answers for client in load) > 0, "the canaries were sent"
    state = measured.cluster
    texts = [scrape(measured, key)]
    for name, port in state.ports.items():
        if name.endswith("metrics"):
            texts.append(requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text)
    files = [p for p in server.directory(measured.home).rglob("*") if p.suffix in {".yml", ".json"}]
    texts += [path.read_text() for path in files]
    assert NAME in texts[0]
    assert len(texts) >= 4
    for secret in (key, state.token(), measured.api_key, PROMPT):
        assert not [text[:200] for text in texts if secret in text]


def test_a_token_of_grafana_goes_nowhere_in_a_rehearsal(measured: Rig, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("glsa_canary")
    words = ("monitor", "push", "--url", "http://127.0.0.1:9", "--token-file")
    said = measured.run(*words, str(tmp_path / "token"), "--dry-run").stdout
    assert "would write the dashboard roundhouse-overview" in said
    ran = measured.run(*words, str(tmp_path / "token"), check=False)
    assert (ran.returncode, ran.stderr.count("error:")) == (1, 1)
    assert "glsa_canary" not in said + ran.stdout + ran.stderr
