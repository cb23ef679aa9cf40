"""The way to the cluster: state file, REST with the token, code package, runtime environment."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterError
from cluster.package import code_root, files, pack
from cluster.session import Cluster, current, from_state, runtime_env, state_file, upload_code


class Head(BaseHTTPRequestHandler):
    """A dashboard as far as these tests know it: a token, and a package store."""

    store: dict[str, bytes] = {}
    seen: list[tuple[str, str]] = []

    def answer(self, status: int, body: bytes = b"{}") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.seen.append(("GET", self.path))
        if self.headers["Authorization"] != "Bearer sesame":
            self.answer(403)
        elif self.path.startswith("/api/packages/"):
            self.answer(200 if self.path in self.store else 404)
        else:
            self.answer(500, b"it hurts")

    def do_PUT(self) -> None:
        self.seen.append(("PUT", self.path))
        self.store[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    Head.store, Head.seen = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state(tmp_path, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    thread.join(10)


def state(tmp_path: Path, dashboard: str) -> Cluster:
    token = tmp_path / "token"
    token.write_text("sesame\n")
    return Cluster(
        address="127.0.0.1:1",
        dashboard=dashboard,
        serve_url="http://127.0.0.1:2",
        home=tmp_path,
        token_file=token,
        temp_dir=tmp_path,
        cluster_id="x-y",
        ray="2.60.0",
        started="",
        ports={},
    )


def test_without_a_cluster_the_message_says_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path))
    with pytest.raises(ClusterError, match=r"no cluster runs for .*; run `roundhouse up`"):
        current()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ('{"schema": 99}', "another version of Roundhouse"),
        ('{"schema": 1, "state": "starting"}', "its start was interrupted"),
        ('{"schema": 1, "state": "ready"}', "lacks 'address'"),
    ],
)
def test_a_bad_state_file_says_what_mends_it(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path))
    state_file().write_text(text)
    with pytest.raises(ClusterError, match=f"{says}.*roundhouse up"):
        current()


def test_the_token_travels_and_a_refusal_is_explained(cluster: Cluster) -> None:
    assert cluster.http("GET", "/api/packages/none").status_code == 404
    cluster.token_file.write_text("guess")
    with pytest.raises(ClusterError, match=r"refused the token of .* \(403\)"):
        cluster.http("GET", "/x")
    cluster.token_file.unlink()
    with pytest.raises(ClusterError, match="No such file"):
        cluster.http("GET", "/x")


def test_a_netrc_or_proxy_of_the_user_changes_nothing(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert cluster.http("GET", "/api/packages/none").status_code == 404


def test_a_dead_head_and_a_failing_one_are_told_apart(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="answered GET /x with 500: it hurts"):
        cluster.json("GET", "/x")
    with pytest.raises(ClusterError, match="does not answer: it died.*roundhouse up"):
        state(tmp_path, "http://127.0.0.1:9").http("GET", "/x", timeout_s=2)


def test_code_is_uploaded_once(cluster: Cluster) -> None:
    first = upload_code(cluster)
    again = upload_code(cluster)
    assert first == again
    assert [method for method, _ in Head.seen] == ["GET", "PUT", "GET"]
    (route,) = Head.store
    assert route == f"/api/packages/gcs/_ray_pkg_{first.revision}.zip"
    names = zipfile.ZipFile(io.BytesIO(Head.store[route])).namelist()
    assert {name.split("/")[0] for name in names} <= {"cluster", "serve_apps", "train_jobs"}
    assert "cluster/session.py" in names


def tree(root: Path, content: str = "x = 1\n") -> Path:
    for name in ("cluster/a.py", "cluster/b/data.jsonl", "train_jobs/c.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_the_name_follows_the_content_alone(tmp_path: Path) -> None:
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert pack(one) == pack(two)
    (two / "cluster" / "a.py").touch()
    (two / "cluster" / "__pycache__").mkdir()
    (two / "cluster" / "__pycache__" / "a.py").write_text("stale")
    (two / "cluster" / ".hidden.py").write_text("secret")
    (two / "cluster" / "weights.safetensors").write_bytes(b"big")
    (two / "tests").mkdir()
    (two / "tests" / "t.py").write_text("")
    assert pack(one) == pack(two)
    (two / "cluster" / "a.py").write_text("x = 2\n")
    assert pack(one).code != pack(two).code
    (one / "cluster" / "a.py").rename(one / "cluster" / "z.py")
    assert pack(one).code != pack(tree(tmp_path / "three")).code


def test_what_travels_is_small_and_whole(tmp_path: Path) -> None:
    package = pack(code_root())
    assert len(package.archive) < 4_000_000
    assert {p.suffix for p in files(code_root())} >= {".py"}
    # unpacked, the code packs to the same name: a job can upload what it runs
    zipfile.ZipFile(io.BytesIO(package.archive)).extractall(tmp_path)
    assert pack(tmp_path).code == package.code


def test_a_runtime_environment_holds_two_keys_and_known_names(cluster: Cluster) -> None:
    code = pack(code_root()).code
    env = runtime_env(code, {"OMP_NUM_THREADS": "1"})
    assert env == {"working_dir": code.uri, "env_vars": {"OMP_NUM_THREADS": "1"}}
    for name in ("LD_PRELOAD", "PATH", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        with pytest.raises(ClusterError, match=name):
            runtime_env(code, {name: "x"})


def test_the_state_file_gives_back_the_cluster(cluster: Cluster) -> None:
    from cluster.local import _state

    written = json.loads(json.dumps(_state(cluster, "ready"), default=str))
    assert from_state(written) == cluster
