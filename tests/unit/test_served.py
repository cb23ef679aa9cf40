"""What `roundhouse status` tells of deployed models: who is in memory, and how much that takes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import status
from cluster.served import in_memory
from cluster.session import Cluster

GB = 10**9
MODELS = [
    {"id": "a", "root": "a@3", "asleep": False, "memory_bytes": GB // 2},
    {"id": "b@live", "root": "b@run.x.2", "asleep": True, "memory_bytes": GB}
    | {"failed": {"b@run.x.3": "a shard differs from its hash"}},
    {"id": "c", "root": "c@1", "asleep": False, "memory_bytes": None},
    {"id": "c-lora", "root": "c-lora@1", "asleep": False, "memory_bytes": None, "parent": "c@1"},
]


class Both(BaseHTTPRequestHandler):
    """Dashboard and gateway in one."""

    answers: dict[str, Any] = {}

    def do_GET(self) -> None:
        wanted = "Bearer key" if self.path.startswith("/v1") else "Bearer sesame"
        known = self.headers["Authorization"] == wanted and self.path in self.answers
        body = json.dumps(self.answers.get(self.path, {})).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    settings = {"limits": {"models_memory_gb": 0.6}}
    gateway = {"deployments": [{"name": "Gateway", "user_config": settings}]}
    Both.answers = {
        "/v1/models": {"data": MODELS},
        "/api/serve/applications/": {"applications": {"gateway": {"deployed_app_config": gateway}}},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Both)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    (tmp_path / "token").write_text("sesame")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "demo.key").write_text("key\n")
    url = f"http://127.0.0.1:{server.server_port}"
    token = tmp_path / "token"
    yield Cluster("", url, url, tmp_path, token, tmp_path, "", "", "", {})
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_who_sleeps_is_told_with_what_each_takes_and_the_budget(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    told = in_memory(cluster)
    assert told is not None
    assert [(m["name"], m["asleep"]) for m in told["models"]] == [
        ("a", False),
        ("b", True),
        ("c", False),
    ]
    assert (told["used_bytes"], told["budget_bytes"]) == (GB // 2, int(0.6 * GB))
    status.show_memory(told)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.split()[:1] == ["b"]] == [
        ["b", "asleep", "1.00", "GB"]
    ]
    assert "  b: b@run.x.3 could not be loaded: a shard differs from its hash" in lines
    assert "0.50 GB of 0.60 GB" in lines[-1]


def test_without_a_budget_or_a_gateway_or_a_key_nothing_is_made_up(cluster: Cluster) -> None:
    del Both.answers["/api/serve/applications/"]
    told = in_memory(cluster)
    assert told is not None
    assert told["budget_bytes"] is None
    (cluster.home / "keys" / "demo.key").write_text("another")
    assert in_memory(cluster) is None
    (cluster.home / "keys" / "demo.key").unlink()
    assert in_memory(cluster) is None
