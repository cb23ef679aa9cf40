"""A cluster that somebody else started: how this home comes to use it, and lets go of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cluster import attach, local, session
from cluster.attach import Wish, is_shared, scale
from cluster.errors import ClusterError, ConfigError, NotEnough
from cluster.home import home
from cluster.resources import Demand, plan
from cluster.status import room

ROOT = Path(__file__).resolve().parents[2]
SERVING = {"controller_info": {"node_id": "a"}, "applications": {}}


class Head(BaseHTTPRequestHandler):
    """A dashboard that answers what ``answers`` holds, to those who have the token."""

    answers: dict[str, Any] = {}

    def do_GET(self) -> None:
        allowed = self.headers["Authorization"] == "Bearer sesame"
        body = json.dumps(self.answers.get(self.path.rstrip("/"), {})).encode()
        self.send_response(200 if allowed else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def nodes(*addresses: str) -> dict[str, Any]:
    raylets = [
        {"nodeManagerAddress": address, "isHeadNode": index == 0, "state": "ALIVE"}
        for index, address in enumerate(addresses)
    ]
    return {"data": {"summary": [{"raylet": raylet} for raylet in raylets]}}


@pytest.fixture
def wish(tmp_path: Path) -> Iterator[Wish]:
    Head.answers = {
        "/api/version": {"ray_version": version("ray")},
        "/nodes?view=summary": nodes("127.0.0.1"),
        "/api/serve/applications": SERVING,
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    token = tmp_path / "token"
    token.write_text("sesame\n")
    token.chmod(0o600)
    yield Wish(f"http://127.0.0.1:{server.server_port}", "http://127.0.0.1:8000", token, 6379, None)
    server.shutdown()
    server.server_close()
    thread.join(10)


def carry_out(wish: Wish, dry_run: bool = False) -> list[str]:
    said: list[str] = []
    attach.attach(wish, said.append, dry_run)
    return said


def test_a_cluster_is_written_down_used_and_let_go(wish: Wish) -> None:
    carry_out(wish)
    found = session.current()
    assert (found.address, found.ports["serve"]) == ("127.0.0.1:6379", 8000)
    assert found.token() == "sesame"
    assert (home() / "keys" / "demo.key").is_file()
    cluster, trouble = local.examine(home())
    assert (cluster, trouble) == (found, None)
    said: list[str] = []
    local.rehearse_down(said.append)
    assert local.down(said.append) == 0
    assert [line.partition(" from ")[0] for line in said] == ["would detach", "detached"]
    with pytest.raises(ClusterError, match="no cluster runs"):
        session.current()


def test_a_rehearsal_writes_nothing(wish: Wish) -> None:
    assert "would use" in carry_out(wish, dry_run=True)[0]
    assert not home().exists()


def test_the_wrong_token_the_wrong_place_and_the_wrong_ray(wish: Wish, tmp_path: Path) -> None:
    wish.token_file.write_text("wrong")
    with pytest.raises(ClusterError, match="refused the token .* look at --dashboard"):
        carry_out(wish)
    wish.token_file.write_text("sesame")
    with pytest.raises(ClusterError, match="does not answer; look at --dashboard .*tunnel"):
        carry_out(replace(wish, dashboard="http://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="is no address; write it as http://"):
        carry_out(replace(wish, dashboard="127.0.0.1:8265"))
    with pytest.raises(ConfigError, match="no such file; --token-file"):
        carry_out(replace(wish, token_file=tmp_path / "none"))
    Head.answers["/api/version"] = {"ray_version": "2.9.0"}
    with pytest.raises(ClusterError, match="runs Ray 2.9.0, and this is Ray"):
        carry_out(wish)
    wish.token_file.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read this token"):
        carry_out(wish)
    assert not session.state_file().exists()


def test_machines_that_cannot_see_this_home_are_refused_with_the_remedy(wish: Wish) -> None:
    Head.answers["/nodes?view=summary"] = nodes("127.0.0.1", "192.0.2.11")
    with pytest.raises(ClusterError, match="192.0.2.11.*mount the shared folder.*or work on the"):
        carry_out(wish)


def test_machines_that_could_start_count_as_others(wish: Wish) -> None:
    with pytest.raises(ClusterError, match="a disk of this machine alone"):
        carry_out(replace(wish, ray_cluster=ROOT / "ray_cluster.yaml"))


def test_a_home_with_a_cluster_of_its_own_keeps_it(wish: Wish) -> None:
    carry_out(wish)
    own = {"pid": 1, "born": 1.0, "name": "raylet"}
    local.write_state(replace(session.current(), processes=(own,)), "ready")
    with pytest.raises(ClusterError, match="`roundhouse down` ends it"):
        carry_out(wish)


def test_up_does_not_start_what_it_did_not_start(wish: Wish) -> None:
    carry_out(wish)
    Head.answers = {}
    local.write_state(replace(session.current(), dashboard="http://127.0.0.1:9"), "ready")
    with pytest.raises(ClusterError, match="which `up` cannot start .* open its tunnel again"):
        local.examine(home())


def test_only_loopback_shuts_other_machines_out(wish: Wish) -> None:
    carry_out(wish)
    found = session.current()
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    assert session.driver_environment(found)[name] == "0"
    assert name not in session.driver_environment(replace(found, address="192.0.2.10:6379"))


def test_shared_folders_are_told_by_their_file_system() -> None:
    mounts = (
        "/dev/root / ext4 rw 0 0\n"
        "fs-1.efs.us-west-2.amazonaws.com:/ /mnt/roundhouse nfs4 rw 0 0\n"
        "/dev/nvme1n1 /mnt/roundhouse/scratch xfs rw 0 0\n"
    )
    assert is_shared(Path("/mnt/roundhouse"), mounts)
    assert is_shared(Path("/mnt/roundhouse/models"), mounts)
    assert not is_shared(Path("/mnt/roundhouse/scratch/x"), mounts)
    assert not is_shared(Path("/mnt/other"), mounts)


def test_what_could_be_started_counts_in_the_plan(wish: Wish) -> None:
    carry_out(wish)
    groups = scale(ROOT / "ray_cluster.yaml")
    assert [(g["name"], g["gpus"], g["max"]) for g in groups] == [
        ("gpu-l40s-1", 1.0, 4),
        ("gpu-l40s-4", 4.0, 2),
    ]
    found = replace(session.current(), scale=groups)
    alive = {"n1": {"CPU": (0.0, 1.0)}}
    report = {
        "loadMetricsReport": {"usageByNode": alive},
        "autoscalerReport": {"activeNodes": {"head": 1, "gpu-l40s-4": 1}},
    }
    Head.answers["/api/cluster_status"] = {"data": {"clusterStatus": report}}
    there = room(found)
    assert [node.name for node in there if node.gpus == 4] == ["gpu-l40s-4 to be started (2)"]
    placed = plan([Demand("rank", cpus=8, gpus=1, count=4)], there)
    assert placed.fits
    assert "to be started" in str(placed)
    with pytest.raises(NotEnough):
        plan([Demand("rank", cpus=8, gpus=8)], there).require()


def test_a_file_that_ray_up_would_not_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text in ("- 1\n", "available_node_types: {a: {}}\n", "a: [\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not a file that `ray up` reads"):
            scale(path)
    path.write_text("provider: {type: local}\n")
    assert scale(path) == ()
