"""``up``, ``down`` and what lies between, through the real verbs on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict

import psutil
import pytest
import requests

from cluster import local, processes
from cluster.ports import Ports, is_free
from cluster.session import runtime_env, upload_code
from tests.ray.cluster_fixtures import Rig, discard, new_rig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

# Serve gives each replica a gRPC port on all interfaces; without the token it answers
# UNAUTHENTICATED. Nothing else of ours may be reachable from outside.
OPEN_PORTS_ALLOWED = ("ray::ServeReplica",)
UP_LIMIT_S = 100.0  # five times the target: this guards liveness, not speed


def ours(rig: Rig) -> list[processes.Proc]:
    return processes.of_home(local.home_id(rig.home))


def listeners(rig: Rig) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield (command line, address) of every socket on which a process of the rig listens."""
    for proc in ours(rig):
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has done its work
            process = psutil.Process(proc.pid)
            name = " ".join(process.cmdline())
            for held in process.net_connections("inet"):
                if held.status == psutil.CONN_LISTEN:
                    yield name, (held.laddr[0], held.laddr[1])


@pytest.fixture
def spare() -> Iterator[Rig]:
    """A second home, for tests that break things."""
    rig = new_rig()
    yield rig
    discard(rig)


def test_up_says_where_everything_is(cluster: Rig) -> None:
    state = cluster.cluster
    for part in (
        state.dashboard,
        str(state.token_file),
        f"{state.serve_url}/v1",
        "roundhouse down",
    ):
        assert part in cluster.said
    assert cluster.up_s < UP_LIMIT_S
    assert cluster.api_key
    assert requests.get(f"{state.serve_url}/-/healthz", timeout=10).status_code in {200, 503}


def test_token_and_state_are_private_and_every_process_has_the_mode_t01(cluster: Rig) -> None:
    token = cluster.cluster.token_file
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((cluster.home / "cluster.json").stat().st_mode) == 0o600
    assert token.read_text().strip() not in (cluster.home / "cluster.json").read_text()
    asked = 0
    for proc in ours(cluster):
        env: dict[str, str] = {}
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has done its work
            env = psutil.Process(proc.pid).environ()
        # a renamed worker has overwritten its environment; it inherited what the others show
        if processes.MARK in env:
            asked += 1
            assert env["RAY_AUTH_MODE"] == "token", proc
            assert env["ROUNDHOUSE_HOME"] == str(cluster.home), proc
    assert asked >= len(local.CORE)


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "/api/jobs/"),
        ("POST", "/api/jobs/"),
        ("GET", "/api/serve/applications/"),
        ("PUT", "/api/serve/applications/"),
        ("DELETE", "/api/serve/applications/"),
        ("GET", "/nodes?view=summary"),
        ("PUT", "/api/packages/gcs/_ray_pkg_0.zip"),
        ("GET", "/api/version"),
    ],
)
def test_rest_wants_the_token_t02(cluster: Rig, method: str, route: str) -> None:
    url = f"{cluster.cluster.dashboard}{route}"
    body = {"entrypoint": "id"}
    none = requests.request(method, url, json=body, timeout=30)
    wrong = requests.request(
        method, url, json=body, timeout=30, headers={"Authorization": "Bearer guess"}
    )
    assert (none.status_code, wrong.status_code) == (401, 403)


def test_the_right_token_opens_and_nothing_ran_without_it_t02(cluster: Rig) -> None:
    token = cluster.cluster.token()
    for header, value in (("Authorization", f"Bearer {token}"), ("X-Ray-Authorization", token)):
        value = f"Bearer {token}" if header.startswith("X-") else value
        answer = requests.get(
            f"{cluster.cluster.dashboard}/api/jobs/", headers={header: value}, timeout=30
        )
        assert answer.status_code == 200, header
        assert answer.json() == []


def test_every_socket_of_ours_is_on_loopback_t04(cluster: Rig) -> None:
    fixed = set(cluster.cluster.ports.values())
    deadline = time.monotonic() + 60
    while late := [port for port in fixed if is_free(port)]:
        assert time.monotonic() < deadline, f"nobody listens on {late}, which are written down"
        time.sleep(0.2)
    listening = 0
    for name, held in listeners(cluster):
        listening += 1
        host = held[0].removeprefix("::ffff:")
        assert host in {"127.0.0.1", "::1"} or name.startswith(OPEN_PORTS_ALLOWED), (
            f"{name} listens on {held}"
        )
    assert listening >= 6, "the audit saw the head's sockets"


def test_up_twice_is_harmless(cluster: Rig) -> None:
    before = cluster.cluster
    again = cluster.run("up").stdout
    assert again.startswith("the cluster runs already")
    assert before.dashboard in again
    assert cluster.cluster == before


def test_status_and_doctor_see_it(cluster: Rig) -> None:
    value = json.loads(cluster.run("status", "--json").stdout)
    assert value["nodes"][0]["cpus"] >= 8
    assert value["memory"][0]["total_bytes"] > value["memory"][0]["used_bytes"] > 0
    assert value["memory"][0]["store_total_bytes"] > 0
    assert value["models"] == []
    text = cluster.run("status").stdout
    assert "applications: none" in text
    checks = json.loads(cluster.run("doctor", "--json", check=False).stdout)["checks"]
    found = {check["what"]: check["state"] for check in checks}
    assert found["cluster"] == "ok"
    assert found["auth/token"] == "ok"


def test_a_job_runs_the_shipped_code_and_joins(cluster: Rig) -> None:
    state = cluster.cluster
    package = upload_code(state)
    source = (
        "import cluster.session as s; s.connect(); import ray, os; "
        "print(s.__file__, ray.cluster_resources()['CPU'], os.environ['ROUNDHOUSE_HOME'])"
    )
    job = {"entrypoint": f'python -c "{source}"', "runtime_env": runtime_env(package, {})}
    name = state.json("POST", "/api/jobs/", json=job)["submission_id"]
    deadline = time.monotonic() + 120
    while state.json("GET", f"/api/jobs/{name}")["status"] not in {"SUCCEEDED", "FAILED"}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    logs = state.json("GET", f"/api/jobs/{name}/logs")["logs"]
    assert package.revision in logs
    assert str(cluster.home) in logs
    assert json.loads(cluster.run("status", "--json").stdout)["jobs"][0]["status"] == "SUCCEEDED"


def test_a_named_port_in_use_is_refused(spare: Rig) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen(1)
        port = held.getsockname()[1]
        ran = spare.run("up", "--port", f"serve={port}", check=False)
    assert ran.returncode == 1
    assert f"error: port {port} (serve) is held by pid {os.getpid()}" in ran.stderr
    assert not (spare.home / "cluster.json").exists()


def test_an_interrupted_start_is_told_and_collected(spare: Rig) -> None:
    starting = subprocess.Popen(spare.command("up"), env=spare.env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(proc.name == "gcs_server" for proc in ours(spare)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    starting.kill()
    starting.wait(10)
    refused = spare.run("status", check=False)
    assert refused.returncode == 1
    assert "is starting, or its start was interrupted" in refused.stderr
    assert "would mend: an earlier start was interrupted" in spare.run("up", "--dry-run").stdout
    assert "ended" in spare.run("down").stdout
    assert ours(spare) == []


def test_stale_state_port_in_use_dead_head_and_down(spare: Rig) -> None:
    """One start, because each takes long: what is told before it, and what ends after it."""
    entry = {"pid": os.getpid(), "born": 0.0, "name": "raylet"}
    keys = ("address", "dashboard", "serve_url", "token_file", "temp_dir", "cluster_id", "ray")
    stale = dict.fromkeys(keys, "x") | {"home": "x", "started": "", "ports": {}}
    stale |= {"schema": 1, "state": "ready", "processes": [entry]}
    spare.home.mkdir()
    (spare.home / "cluster.json").write_text(json.dumps(stale))
    names = [name for name in asdict(Ports()) if name != "serve"]
    spare.env["ROUNDHOUSE_PORTS"] = ",".join(f"{name}=0" for name in names)
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_free(8000):  # or somebody else holds it, which is as good
            held.bind(("127.0.0.1", 8000))
            held.listen(1)
        spare.up()
    assert "mending: the state file is stale" in spare.said
    assert "mending: port 8000 (serve) is held by" in spare.said
    state = spare.cluster
    assert state.ports["serve"] != 8000

    (raylet,) = [proc for proc in local.core(state) if proc.name == "raylet"]
    os.kill(raylet.pid, signal.SIGKILL)
    while raylet.alive():
        time.sleep(0.05)
    told = spare.run("up", "--dry-run").stdout
    assert f"raylet (pid {raylet.pid}) ended" in told or "stale" in told
    left = ours(spare)
    assert len(left) >= 3, "the dead raylet leaves the rest of the head behind"
    spare.run("down")
    assert ours(spare) == []
    assert not [proc for proc in left if proc.alive()]
    assert not state.temp_dir.exists()
    assert not (spare.home / "cluster.json").exists()
    assert (spare.home / "keys" / "demo.key").exists(), "keys outlive the cluster"
    assert spare.run("down").stdout.strip() == "nothing was running"
