"""Dashboard, alerts, Prometheus' files and process, and what is pushed to a Grafana."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cluster import local, metrics, processes, session
from cluster.errors import ClusterError, MonitorError
from cluster.monitoring import cli, grafana, server
from cluster.monitoring.alerts import ALERTS, rules
from cluster.monitoring.board import ROWS
from cluster.monitoring.dashboard import FOLDER_UID, SOURCE_UID, UID, dashboard
from cluster.monitoring.files import EXAMPLE, rendered
from cluster.monitoring.grafana import Address, Grafana
from cluster.monitoring.push import Pushed, plan, push
from cluster.session import Cluster

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "glsa_canary_of_the_grafana_token"
NAMES = re.compile(rf"{metrics.EXPORTED}[a-z0-9_]+")


# --- what is rendered --------------------------------------------------------------------------


def test_the_files_in_the_tree_are_what_the_code_says() -> None:
    folder = ROOT / "configs" / "monitoring"
    held = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert set(held) == set(rendered(EXAMPLE))
    for name, text in rendered(EXAMPLE).items():
        assert held[name].read_text() == text, "`roundhouse monitor render --write`"


def every_query() -> list[str]:
    panels = [query.expr for row in ROWS for p in row.panels for query in p.queries]
    return [*panels, *(alert.expr for alert in ALERTS)]


def test_queries_name_only_series_that_exist_and_all_of_them_are_shown() -> None:
    known = {m.series for m in metrics.ALL if m.kind != "histogram"}
    known |= {f"{m.series}_bucket" for m in metrics.ALL if m.kind == "histogram"}
    asked = {name for expr in every_query() for name in NAMES.findall(expr)}
    assert asked - known == set()
    unseen = known - asked
    assert unseen == {metrics.TRAIN_TOKENS.series}, "a metric that no panel shows"


def test_no_query_uses_the_sum_that_ray_makes_up() -> None:
    for expr in every_query():
        assert not re.search(r"_sum\b", expr), expr


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    board = dashboard()
    assert board["uid"] == UID
    assert not UID.startswith("ray")
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        if panel["type"] != "row":
            assert [t["refId"] for t in panel["targets"]] == list("ABCD")[: len(panel["targets"])]
            assert panel["datasource"]["uid"] == "${datasource}"
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(titles)) == len(titles)
    assert [row.title for row in ROWS] == [
        *("Overview", "Latency", "Tokens", "Queue and cache", "Memory of models"),
        *("Training", "Cluster"),
    ]


def test_every_alert_says_where_to_look() -> None:
    for rule in rules()["groups"][0]["rules"]:
        assert rule["alert"].startswith("Roundhouse")
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.fullmatch(r"\d+m", rule["for"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
def test_prometheus_itself_takes_rules_and_queries(tmp_path: Path) -> None:
    files = rendered(EXAMPLE)
    shown = [
        {"record": f"panel:{n}", "expr": grafana_off(query.expr)}
        for n, query in enumerate(q for row in ROWS for p in row.panels for q in p.queries)
    ]
    queries = {"groups": [{"name": "panels", "rules": shown}]}
    (tmp_path / "alerts.yml").write_text(files["alerts.yml"])
    (tmp_path / "panels.yml").write_text(yaml.safe_dump(queries))
    (tmp_path / "prometheus.yml").write_text(files["prometheus.yml"])
    for kind, name in (("rules", "panels.yml"), ("config", "prometheus.yml")):
        # syntax only: the token of the example's cluster need not be there
        line = ["promtool", "check", kind, *(["--syntax-only"] if kind == "config" else []), name]
        ran = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def grafana_off(expr: str) -> str:
    """Return a query with Grafana's variables filled in."""
    return expr.replace("$model", ".*").replace("$__rate_interval", "1m")


# --- Prometheus --------------------------------------------------------------------------------

FAKE = """\
#!{python}
import http.server, os, pathlib, signal, sys
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
host, port = options["web.listen-address"].split(":")
mark = pathlib.Path(options["storage.tsdb.path"]).with_name("seen")
def note(word):
    with mark.open("a") as file:
        file.write(word + "\\n")
signal.signal(signal.SIGHUP, lambda *_: note("again"))
if pathlib.Path("broken").exists():
    sys.exit("the configuration is not to my liking")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "roundhouse"
    home.mkdir()
    return home


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster that is written down, and a program called prometheus on PATH."""
    programs = home.parent / "bin"
    programs.mkdir()
    (programs / "prometheus").write_text(FAKE.replace("{python}", sys.executable))
    (programs / "prometheus").chmod(0o700)
    monkeypatch.setenv("PATH", str(programs))
    state = {"address": "a", "dashboard": "http://127.0.0.1:1", "serve_url": "s", "home": home}
    state |= {"token_file": home / "auth" / "token", "temp_dir": "t", "cluster_id": "id-1"}
    state |= {"ray": "2", "started": "", "ports": {}, "processes": [], "schema": 1}
    (home / "cluster.json").write_text(json.dumps({**state, "state": "ready"}, default=str))
    return session.current()


@pytest.fixture
def ended(home: Path) -> Iterator[None]:
    yield
    if running := server.running(home):
        os.kill(running.pid, signal.SIGKILL)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("ended")
def test_up_writes_private_files_and_starts_one_prometheus(here: Cluster) -> None:
    said: list[str] = []
    started = server.up(here, 0, said.append)
    assert started is not None
    folder = here.home / "monitoring"
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    found = config["scrape_configs"][0]["http_sd_configs"][0]
    assert found["url"] == f"{here.dashboard}/api/prometheus/sd"
    assert found["authorization"] == {"type": "Bearer", "credentials_file": str(here.token_file)}
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != "seen"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert started.pid in {proc.pid for proc in processes.of_home(local.home_id(here.home))}, (
        "`roundhouse down` finds it by its mark"
    )

    again = server.up(here, None, said.append)
    assert again == started
    assert said == [], "nothing had changed"
    (folder / "alerts.yml").write_text("groups: []\n")
    assert server.up(here, None, said.append) == started
    assert said == ["Prometheus reads its files again"]
    until(lambda: (folder / "seen").is_file() and "again" in (folder / "seen").read_text())
    with pytest.raises(MonitorError, match=f"runs on port {started.port} already"):
        server.up(here, started.port + 1, said.append)


def test_a_prometheus_that_does_not_start_says_why(here: Cluster) -> None:
    (here.home / "monitoring").mkdir()
    (here.home / "monitoring" / "broken").touch()
    with pytest.raises(MonitorError, match=r"exit 1(.|\n)*not to my liking"):
        server.up(here, 0, print)
    assert server.running(here.home) is None


def test_without_a_program_the_files_are_written_and_the_next_step_told(
    here: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(here.home))
    value = as_json("monitor", "up", "--port", "0")
    assert value["prometheus"] is None
    assert "apt-get install" in value["say"]
    assert (here.home / "monitoring" / "grafana" / "dashboards" / "roundhouse.json").is_file()


def test_a_rehearsal_writes_nothing(here: Cluster) -> None:
    value = as_json("monitor", "up", "--port", "0", "--dry-run")
    assert value["command"][0].endswith("/bin/prometheus")
    assert any(part.startswith("--web.listen-address=127.0.0.1:") for part in value["command"])
    assert not (here.home / "monitoring").exists()


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.ports, "is_free", lambda port: port not in {9090, 9091, 7})
    assert server.choose_port(None) == 9092
    assert server.choose_port(0) > 0
    with pytest.raises(ClusterError, match="port 7 is held by"):
        server.choose_port(7)


# --- Grafana -----------------------------------------------------------------------------------


@dataclass
class FakeGrafana:
    """What a Grafana answers, and everything that it was asked."""

    url: str = ""
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    sources: dict[str, Any] = field(default_factory=dict)
    version: int = 0
    status: int = 0
    """An error to answer with, whatever is asked."""
    text: bytes | None = None
    """A body that is no JSON."""
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((method, path, body))
        if self.status:
            return self.status, {"message": "I will not"}
        match method, path:
            case "GET", "/graf/api/folders/roundhouse":
                return (200, {}) if self.folders else (404, {"message": "not found"})
            case "POST", "/graf/api/folders":
                self.folders.add(body["uid"])
                return 200, body
            case "GET", "/graf/api/datasources/uid/roundhouse-prometheus":
                held = self.sources.get(SOURCE_UID)
                return (200, held) if held else (404, {"message": "not found"})
            case ("POST", "/graf/api/datasources") | (
                "PUT",
                "/graf/api/datasources/uid/roundhouse-prometheus",
            ):
                self.sources[body["uid"]] = body
                return 200, body
            case "POST", "/graf/api/dashboards/db":
                if body["dashboard"]["version"] != self.version and not body["overwrite"]:
                    return 412, {"status": "version-mismatch", "message": "changed by someone"}
                self.version += 1
                return 200, {"version": self.version, "url": f"/graf/d/{UID}/roundhouse"}
        return 404, {"message": f"no {path}"}


@pytest.fixture
def fake() -> Iterator[FakeGrafana]:
    state = FakeGrafana()

    class Handler(BaseHTTPRequestHandler):
        def handle_all(self) -> None:
            size = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(size)) if size else None
            state.tokens.add(self.headers.get("authorization"))
            status, value = state.answer(self.command, self.path, body)
            data = json.dumps(value).encode() if state.text is None else state.text
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_all

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_port}/graf"
        yield state
        http.shutdown()
        thread.join()


def send(fake: FakeGrafana, folder: Path, overwrite: bool = False) -> Pushed:
    at = Address.parse(fake.url)
    return push(at, TOKEN, "http://prom:9090", folder, overwrite, lambda line: None)


def test_a_push_makes_folder_source_and_dashboard(fake: FakeGrafana, tmp_path: Path) -> None:
    done = send(fake, tmp_path / "m")
    root = fake.url.removesuffix("/graf")
    assert done == Pushed(f"{root}/graf/d/{UID}/roundhouse", 1, True, True)
    assert fake.tokens == {f"Bearer {TOKEN}"}
    assert [f"{method} {path.removeprefix('/graf/api')}" for method, path, _ in fake.asked] == [
        "GET /folders/roundhouse",
        "POST /folders",
        "GET /datasources/uid/roundhouse-prometheus",
        "POST /datasources",
        "POST /dashboards/db",
    ]
    body = fake.asked[-1][2]
    assert (body["folderUid"], body["overwrite"]) == (FOLDER_UID, False)
    assert body["dashboard"] == {**dashboard(), "id": None, "version": 0}
    assert fake.sources[SOURCE_UID]["url"] == "http://prom:9090"
    assert fake.sources[SOURCE_UID]["access"] == "proxy"

    assert send(fake, tmp_path / "m") == Pushed(done.url, 2, False, False)
    assert fake.asked[-1][2]["dashboard"]["version"] == 1
    assert not [path for method, path, _ in fake.asked if method == "PUT"], "it was right already"
    fake.sources[SOURCE_UID]["url"] = "http://elsewhere"
    send(fake, tmp_path / "m")
    assert fake.sources[SOURCE_UID]["url"] == "http://prom:9090"
    assert TOKEN not in (tmp_path / "m" / "pushed.json").read_text()


def test_a_change_made_in_grafana_is_not_overwritten_unasked(
    fake: FakeGrafana, tmp_path: Path
) -> None:
    send(fake, tmp_path)
    fake.version += 1  # somebody saved it there
    with pytest.raises(MonitorError, match="--overwrite replaces it"):
        send(fake, tmp_path)
    assert send(fake, tmp_path, overwrite=True).version == 3
    assert send(fake, tmp_path).version == 4, "and then it is known again"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, r"refused the token \(401\).*Service accounts"),
        (403, "may not write the folder"),
        (500, "500 I will not"),
        (400, "400 I will not"),
    ],
)
def test_refusals_say_what_to_do_and_never_the_token(
    fake: FakeGrafana, tmp_path: Path, status: int, said: str
) -> None:
    fake.status = status
    with pytest.raises(MonitorError, match=said) as told:
        send(fake, tmp_path)
    assert TOKEN not in str(told.value)


@pytest.mark.parametrize("text", [b"<html>", b"[]", b"", b'"x"', b"\xff"])
def test_something_else_than_a_grafana_is_told(
    fake: FakeGrafana, tmp_path: Path, text: bytes
) -> None:
    fake.text, fake.folders = text, {"roundhouse"}
    fake.sources[SOURCE_UID] = {}
    with pytest.raises(MonitorError, match="does not answer as Grafana does"):
        send(fake, tmp_path)


def test_nobody_and_somebody_silent_are_told(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        at = Address.parse(f"http://127.0.0.1:{held.getsockname()[1]}")
        with pytest.raises(MonitorError, match="nobody answers"):
            Grafana(at, TOKEN).see_to_folder()
        held.listen(1)
        with pytest.raises(MonitorError, match="did not answer in time"):
            Grafana(at, TOKEN, timeout_s=0.1).see_to_folder()


def test_addresses() -> None:
    for text, again in {
        "http://127.0.0.1:3000": "http://127.0.0.1:3000",
        "https://Graf.example/a/b/": "https://graf.example/a/b",
        "http://[::1]:3000/": "http://[::1]:3000",
    }.items():
        assert str(Address.parse(text)) == again
    assert Grafana(Address.parse("https://g.example/a"), "t")._face.api.url == (
        "https://g.example/a/api"
    )
    assert Address.parse("http://g.example").is_open
    assert not Address.parse("https://g.example").is_open
    for wrong in ("g.example", "ftp://g", "http://u:hunter2@g", "http://g:x", "http://g?a=b", ""):
        with pytest.raises(MonitorError, match="--url must be") as told:
            Address.parse(wrong)
        assert "hunter2" not in str(told.value)


def test_the_unmaintained_package_is_known_in_one_place_only() -> None:
    for path in [*ROOT.glob("cluster/**/*.py"), *ROOT.glob("serve_apps/**/*.py")]:
        if path != Path(grafana.__file__):
            assert "grafana_api" not in path.read_text(), path


# --- the verbs ---------------------------------------------------------------------------------


def invoke(*words: str) -> Any:
    app = typer.Typer()
    cli.register(app)
    return CliRunner().invoke(app, list(words))


def as_json(*words: str) -> Any:
    ran = invoke(*words, "--json")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    return json.loads(ran.stdout)


def test_push_by_the_verb_with_a_token_from_a_file(fake: FakeGrafana, home: Path) -> None:
    secret = home / "token"
    secret.write_text(f"{TOKEN}\n")
    words = ("monitor", "push", "--url", fake.url, "--token-file", str(secret))
    rehearsed = as_json(*words, "--dry-run")
    assert fake.asked == []
    assert rehearsed["plan"] == plan(Address.parse(fake.url), "http://127.0.0.1:9090", 0)
    assert as_json(*words, "--no-source") == {
        "url": f"{fake.url}/d/{UID}/roundhouse",
        "version": 1,
        "new_folder": True,
        "new_source": None,
    }
    assert not fake.sources
    as_json(*words, "--prometheus", "http://prom")
    assert fake.sources[SOURCE_UID]["url"] == "http://prom"


def test_a_token_is_asked_for_once(home: Path) -> None:
    (home / "empty").touch()
    url = ("monitor", "push", "--url", "http://127.0.0.1:1")
    for words, said in {
        (): "once: --token-file",
        ("--token", "a", "--token-file", "b"): "once: --token-file",
        ("--token-file", str(home / "nix")): "cannot be read",
        ("--token-file", str(home / "empty")): "is empty",
        ("--token", "two words"): "more than one word",
    }.items():
        ran = invoke(*url, *words)
        assert isinstance(ran.exception, MonitorError), words
        assert said in str(ran.exception)


def test_render_compares_writes_and_says_so(tmp_path: Path) -> None:
    to = ("--to", str(tmp_path))
    assert invoke("monitor", "render", *to).exit_code == 1
    assert as_json("monitor", "render", *to, "--write")["differ"]
    assert as_json("monitor", "render", *to)["differ"] == []
    (tmp_path / "alerts.yml").write_text("")
    ran = invoke("monitor", "render", *to, "--json")
    assert (ran.exit_code, json.loads(ran.stdout)["differ"]) == (1, [str(tmp_path / "alerts.yml")])
