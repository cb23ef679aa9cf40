"""``up`` and ``down``: one Ray head on this machine, on loopback, behind a token."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster import head, machine, processes
from cluster.errors import ClusterError
from cluster.home import home
from cluster.keys import KeyStore
from cluster.ports import LOOPBACK, Ports, settle, wanted
from cluster.private import is_private, locked, make_private_dir, write_private
from cluster.processes import Proc
from cluster.session import STATE_SCHEMA, Cluster, from_state, read_state, state_file

Say = Callable[[str], None]

CORE = frozenset({"gcs_server", "raylet", "dashboard"})
"""Without any one of these there is no cluster."""
SCRATCH = Path("/tmp")  # not $TMPDIR: a unix socket's path ends at some 107 bytes


def up(options: Sequence[str], say: Say) -> Cluster:
    """Start the cluster of this home, or return the one that runs; ready to deploy and train.

    ``options`` are port choices (:func:`cluster.ports.wanted`); ``say`` is told each thing that
    was found and mended. Interrupted or failed, it takes everything down again.
    """
    chosen = wanted(options)
    root = home()
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".cluster.lock", "the cluster is being started or ended", timeout_s=60):
        cluster, trouble = examine(root)
        if cluster:
            say("the cluster runs already")
            head.start_serve(cluster)
            KeyStore(root / "keys").demo_key()
            return cluster
        if trouble:
            say(f"mending: {trouble}")
            _collect(root)
        ports, told = settle(chosen, processes.listener)
        for line in told:
            say(f"mending: {line}")
        try:
            return _start(root, ports)
        except BaseException:
            _collect(root)
            raise


def down(say: Say) -> int:
    """End what ``up`` started for this home and remove its scratch files; return how many ended.

    Library, runs and keys stay. Harmless when nothing runs. ClusterError when a process outlives
    KILL, naming its pid.
    """
    root = home()
    if not root.is_dir():
        say("nothing was running")
        return 0
    with locked(root / ".cluster.lock", "the cluster is being started or ended", timeout_s=60):
        other = attached(root)
        ended = _collect(root)
    if other:
        say(f"detached from {other}, which goes on; `ray down` ends a cluster that `ray up` began")
        return ended
    say(f"ended {ended} processes" if ended else "nothing was running")
    return ended


def rehearse(options: Sequence[str], say: Say) -> None:
    """Say what :func:`up` would do now, and do none of it."""
    root = home()
    cluster, trouble = examine(root)
    if cluster:
        say(f"the cluster runs already: {cluster.dashboard}")
        return
    ports, told = settle(wanted(options), processes.listener)
    for line in [trouble, *told] if trouble else told:
        say(f"would mend: {line}")
    say(f"home   {root}")
    say(f"ports  {ports}")
    say(f"would run: {shlex.join(head.command(ports, temp_dir(root), machine.look()))}")


def rehearse_down(say: Say) -> None:
    """Say what :func:`down` would end."""
    strays = processes.of_home(home_id(home()))
    if other := attached(home()):
        say(f"would detach from {other}, which goes on")
        return
    for proc in strays:
        say(f"would end pid {proc.pid} ({proc.name})")
    if not strays:
        say("nothing is running")


def examine(root: Path) -> tuple[Cluster | None, str | None]:
    """Return the running cluster, or what is wrong with the remains of one, or neither.

    A head whose processes all live but which does not answer is left alone: ClusterError.
    """
    strays = processes.of_home(home_id(root))
    pids = ", ".join(str(proc.pid) for proc in strays[:6]) + (" ..." if len(strays) > 6 else "")
    try:
        state = read_state(state_file(root))
        cluster = from_state(state) if state and state.get("state") == "ready" else None
    except ClusterError as error:
        return None, str(error).split(";")[0]
    if cluster is None:
        if state:
            return None, f"an earlier start was interrupted ({len(strays)} processes left)"
        return None, f"a cluster without its state file is left (pids {pids})" if strays else None
    if not cluster.processes:
        try:
            cluster.http("GET", "/api/gcs_healthz", timeout_s=20.0)
        except ClusterError as error:
            raise ClusterError(
                f"this home is attached to {cluster.dashboard}, which `up` cannot start "
                f"({str(error).split(';')[0]}); open its tunnel again, or `roundhouse down`, which "
                "detaches"
            ) from None
        return cluster, None
    dead = [proc for proc in core(cluster) if not proc.alive()]
    if dead and not strays:
        return None, "the state file is stale: none of its processes runs any more"
    if dead:
        names = ", ".join(f"{proc.name} (pid {proc.pid})" for proc in dead)
        return None, f"the head is dead: {names} ended, {len(strays)} processes are left"
    cluster.http("GET", "/api/gcs_healthz", timeout_s=20.0)
    return cluster, None


def attached(root: Path) -> str | None:
    """Return the dashboard of a cluster that this home uses and did not start, if it does."""
    try:
        state = read_state(state_file(root)) or {}
    except ClusterError:
        return None  # not a state file of ours: collecting removes it
    ours = state.get("state") != "ready" or state.get("processes")
    return None if ours else str(state.get("dashboard"))


def core(cluster: Cluster) -> list[Proc]:
    """Return the processes without which there is no cluster."""
    return [Proc(**entry) for entry in cluster.processes if entry["name"] in CORE]


def home_id(root: Path) -> str:
    """Return eight characters that stand for a home: its mark, and its scratch directory."""
    return hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]


def temp_dir(root: Path) -> Path:
    """Return Ray's scratch directory for a home: short, local, outside it."""
    return SCRATCH / f"rh-{home_id(root)}"


def ensure_token(root: Path) -> Path:
    """Return the token's file, 0600 in a 0700 directory; a missing or exposed one is made new."""
    path = make_private_dir(root / "auth") / "token"
    if not is_private(path) or not path.read_text().strip():
        write_private(path, secrets.token_hex(32) + "\n")
    return path


def _start(root: Path, ports: Ports) -> Cluster:
    scratch = temp_dir(root)
    _remove_scratch(scratch)
    scratch.mkdir(mode=0o700)
    # Whatever starts Serve puts its directory first on the path of every replica: an empty one.
    empty = scratch / "empty"
    empty.mkdir()
    (scratch / "store").mkdir()
    token = ensure_token(root)
    cluster_id = f"{home_id(root)}-{secrets.token_hex(4)}"
    cluster = Cluster(
        address=f"{LOOPBACK}:{ports.gcs}",
        dashboard=f"http://{LOOPBACK}:{ports.dashboard}",
        serve_url=f"http://{LOOPBACK}:{ports.serve}",
        home=root,
        token_file=token,
        temp_dir=scratch,
        cluster_id=cluster_id,
        ray=version("ray"),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        ports=asdict(ports),
    )
    write_state(cluster, "starting")
    environment = head.environment(root, token, cluster_id, ports, os.environ)
    head.start(head.command(ports, scratch, machine.look()), environment, empty, scratch)
    head.wait_for_dashboard(cluster)
    head.start_serve(cluster)
    KeyStore(root / "keys").demo_key()
    core_now = [asdict(proc) for proc in processes.of_home(home_id(root)) if proc.name in CORE]
    ready = from_state({**_state(cluster, "ready"), "processes": core_now})
    if missing := CORE - {str(entry["name"]) for entry in core_now}:
        raise ClusterError(f"{', '.join(sorted(missing))} ended right after the start; try again")
    write_state(ready, "ready")
    return ready


def _collect(root: Path) -> int:
    """End every process of this home's clusters, then remove what they leave on the disk."""
    ended: set[int] = set()
    for _ in range(5):  # a dying raylet may still start a worker
        strays = processes.of_home(home_id(root))
        if not strays:
            break
        left = processes.end(strays)
        ended |= {proc.pid for proc in strays} - {proc.pid for proc in left}
    if left := processes.of_home(home_id(root)):
        raise ClusterError(
            f"processes {', '.join(str(proc.pid) for proc in left)} do not end, not even by "
            "KILL; look at them with ps, then repeat `roundhouse down`"
        )
    _remove_scratch(temp_dir(root))
    state_file(root).unlink(missing_ok=True)
    return len(ended)


def _remove_scratch(scratch: Path) -> None:
    try:
        held = scratch.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(held.st_mode) or held.st_uid != os.getuid():
        raise ClusterError(f"{scratch} is in the way: not a directory of yours; remove it")
    shutil.rmtree(scratch)


def _state(cluster: Cluster, state: str) -> dict[str, Any]:
    return {"schema": STATE_SCHEMA, "state": state, **asdict(cluster)}


def write_state(cluster: Cluster, state: str) -> None:
    """Write down which cluster this home uses, for its owner alone."""
    text = json.dumps(_state(cluster, state), indent=2, default=str)
    write_private(state_file(cluster.home), text + "\n")
