"""Starting and ending one machine's cluster, without starting one: ports, sizes, files, pids."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster import head, local, machine, processes
from cluster.device import fast_bf16, resolve_dtype
from cluster.errors import ClusterError, ConfigError
from cluster.machine import GIB, MIB, Machine
from cluster.ports import Ports, any_free, is_free, settle, wanted
from cluster.private import is_private, locked, make_private_dir, write_private
from cluster.processes import Proc

SMALL = Machine(cores=2, memory_bytes=16 * GIB, memory_free_bytes=12 * GIB, shm_free_bytes=8 * GIB)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(local, "SCRATCH", tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def nobody(port: int) -> str:
    return "pid 7 (caddy)"


def test_ports_come_from_the_variable_and_options_win() -> None:
    environ = {"ROUNDHOUSE_PORTS": "serve=8100,gcs=0"}
    assert wanted(["serve=8200"], environ) == {"serve": 8200, "gcs": 0}
    assert wanted(["any", "serve=9"], {}) == {**dict.fromkeys(asdict(Ports()), 0), "serve": 9}
    assert wanted([], {}) == {}
    for wrong in ("serve", "http=80", "serve=x", "serve=70000", "serve=-1"):
        with pytest.raises(ConfigError, match="NAME=NUMBER"):
            wanted([wrong], {})


def test_a_default_port_in_use_gives_way_and_is_told() -> None:
    ports, told = settle({}, nobody, free=lambda port: port not in {8000, 8001})
    assert ports == Ports(serve=8002)
    assert told == ["port 8000 (serve) is held by pid 7 (caddy); using 8002"]


def test_a_named_port_in_use_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"port 8000 \(serve\) is held by pid 7 \(caddy\)"):
        settle({"serve": 8000}, nobody, free=lambda port: port != 8000)
    with pytest.raises(ConfigError, match="two of them are the same"):
        settle({"serve": 9000, "gcs": 9000}, nobody)
    with pytest.raises(ClusterError, match="8000 to 8099"):
        settle({}, nobody, free=lambda port: port < 8000 or port > 8099)


def test_no_port_is_given_out_twice() -> None:
    ports, _ = settle({"gcs": 8265}, nobody, free=lambda port: True)
    assert (ports.gcs, ports.dashboard) == (8265, 8266)
    drawn = iter([5, 5, 6, 7, 8, 9, 10, 11, 12])
    free, _ = settle(wanted(["any"], {}), nobody, fresh=lambda: next(drawn))
    assert len(set(asdict(free).values())) == len(asdict(free))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_listener_is_seen_and_named(host: str) -> None:
    with socket.socket() as held:
        held.bind((host, 0))
        held.listen(1)
        port = held.getsockname()[1]
        assert not is_free(port)
        assert f"pid {os.getpid()}" in processes.listener(port)
    assert is_free(any_free())


def test_the_object_store_follows_the_machine(tmp_path: Path) -> None:
    assert machine.object_store(SMALL, tmp_path).size_bytes == 16 * GIB // 5
    docker = Machine(2, 8 * GIB, 6 * GIB, 64 * MIB)
    assert machine.object_store(docker, tmp_path) == machine.ObjectStore(8 * GIB // 5, tmp_path)
    huge = Machine(96, 1024 * GIB, 900 * GIB, 500 * GIB)
    assert machine.object_store(huge, tmp_path).size_bytes == 16 * GIB


def test_cpus_and_limits(tmp_path: Path) -> None:
    assert [machine.logical_cpus(cores) for cores in (1, 2, 4, 16)] == [8, 8, 8, 32]
    assert machine.container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    assert machine.container_limit(tmp_path) == GIB


def test_the_head_listens_on_loopback_behind_a_token(root: Path) -> None:
    given = {"RAY_AUTH_TOKEN": "x", "RAY_ADDRESS": "y", "PYTHONPATH": "/src", "LANG": "C"}
    env = head.environment(root, root / "t", "id", Ports(), given | {"no_proxy": "corp"})
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_AUTH_TOKEN_PATH"] == str(root / "t")
    assert {"RAY_AUTH_TOKEN", "RAY_ADDRESS", "PYTHONPATH"}.isdisjoint(env)
    assert env["LANG"] == "C"
    assert env["no_proxy"] == "corp,127.0.0.1,localhost"
    assert Path(env["ROUNDHOUSE_HOME"]).is_absolute()
    line = head.command(Ports(), root / "s", SMALL)
    for part in ("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=8"):
        assert part in line
    assert not any(part.startswith("--plasma-directory") for part in line)


def test_scratch_paths_leave_room_for_a_socket(root: Path) -> None:
    path = Path("/tmp") / local.temp_dir(root).name / "session_2026-01-01_00-00-00_000000_1234567"
    assert len(str(path / "sockets" / "plasma_store")) < 100
    assert local.home_id(root) != local.home_id(root.parent)


def test_the_token_is_private_whatever_the_umask_t01(root: Path) -> None:
    umask = os.umask(0)
    try:
        path = local.ensure_token(root)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    first = path.read_text()
    assert len(first.strip()) == 64
    assert local.ensure_token(root).read_text() == first
    path.chmod(0o644)
    assert local.ensure_token(root).read_text() != first, "an exposed token is made new"
    assert is_private(path)


def test_private_files_never_follow_links_and_locks_end(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ClusterError, match="not a link"):
        make_private_dir(tmp_path / "link")
    write_private(tmp_path / "a", "1")
    write_private(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with (
        locked(tmp_path / "l", "busy"),
        pytest.raises(ClusterError, match="busy: another process holds"),
        locked(tmp_path / "l", "busy", timeout_s=0.1),
    ):
        pass


def sleeper(mark: str) -> subprocess.Popen[bytes]:
    code = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    env = {**os.environ, processes.MARK: mark}
    return subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True)


def test_marked_processes_and_their_children_are_found_and_ended(root: Path) -> None:
    mine, other = sleeper(f"{local.home_id(root)}-1"), sleeper("00000000-1")
    try:
        deadline = time.monotonic() + 20
        while len(found := processes.of_home(local.home_id(root))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert mine.pid in {proc.pid for proc in found}
        assert other.pid not in {proc.pid for proc in found}
        told: list[str] = []
        assert local.down(told.append) == 2
        assert told == ["ended 2 processes"]
        assert other.poll() is None
        assert local.down(told.append) == 0
    finally:
        for child in (mine, other):
            child.kill()
            child.wait(10)


def test_a_reused_pid_is_not_ours() -> None:
    here = Proc(os.getpid(), time.time() - 1e6, "raylet")
    assert not here.alive()
    assert processes.end([here]) == []


@pytest.mark.parametrize("born", [0.0, 1.0])
def test_a_stale_state_file_is_told_and_removed(root: Path, born: float) -> None:
    entry = {"pid": os.getpid(), "born": born, "name": "raylet"}
    keys = ("address", "dashboard", "serve_url", "token_file", "temp_dir", "cluster_id", "ray")
    state = dict.fromkeys(keys, "x") | {"home": str(root), "started": "", "ports": {}}
    state |= {"schema": 1, "state": "ready", "processes": [entry]}
    (root / "cluster.json").write_text(json.dumps(state))
    cluster, trouble = local.examine(root)
    assert cluster is None
    assert trouble == "the state file is stale: none of its processes runs any more"
    assert local.down(lambda text: None) == 0
    assert local.examine(root) == (None, None)


def test_an_unreadable_or_half_written_state_is_told(root: Path) -> None:
    (root / "cluster.json").write_text("{")
    assert "cannot be read" in str(local.examine(root)[1])
    (root / "cluster.json").write_text('{"schema": 1, "state": "starting"}')
    assert local.examine(root)[1] == "an earlier start was interrupted (0 processes left)"


def test_a_start_that_fails_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [sys.executable, "-c", "import sys; print('port 1 is taken'); sys.exit(3)"]
    monkeypatch.setattr(head, "command", lambda *_: broken)
    with pytest.raises(ClusterError, match=r"did not start \(exit 3\)(.|\n)*port 1 is taken"):
        local.up(["any"], lambda text: None)
    assert not (root / "cluster.json").exists()
    assert not local.temp_dir(root).exists()


def test_a_strangers_scratch_directory_is_not_touched(root: Path) -> None:
    local.temp_dir(root).symlink_to(root)
    with pytest.raises(ClusterError, match="in the way"):
        local.down(lambda text: None)
    assert root.is_dir()


def test_the_fast_number_format_is_read_from_the_cpu(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nflags\t: fpu avx2\n")
    assert not fast_bf16("cpu", info)
    assert resolve_dtype("auto", "cpu", info) == "float32"
    info.write_text("flags\t: fpu avx512_bf16\n")
    assert resolve_dtype("auto", "cpu", info) == "bfloat16"
    assert resolve_dtype("float32", "cpu", info) == "float32"
    assert not fast_bf16("cpu", tmp_path / "none")
    with pytest.raises(ConfigError, match="use auto, float32 or bfloat16"):
        resolve_dtype("fp8", "cpu", info)
