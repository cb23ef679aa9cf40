"""``roundhouse attach``: use a cluster that somebody else started, as with `ray up`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster import head, local
from cluster.errors import ClusterError, ConfigError
from cluster.home import home
from cluster.keys import KeyStore
from cluster.ports import LOOPBACK
from cluster.private import is_private, locked
from cluster.session import Cluster, read_state, state_file

Say = Callable[[str], None]

SHARED = ("nfs", "cifs", "smb", "ceph", "lustre", "gpfs", "beegfs", "gluster", "9p", "fuse", "afs")
"""How the names of file systems begin that several machines can have mounted."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user said about the cluster."""

    dashboard: str
    """http URL of its dashboard, perhaps the near end of a tunnel."""
    serve_url: str
    """http URL of its endpoint, without ``/v1``."""
    token_file: Path
    gcs_port: int
    ray_cluster: Path | None
    """The file that `ray up` read: which machines could still be started."""


def attach(wish: Wish, say: Say, dry_run: bool) -> Cluster:
    """Write the cluster down as this home's, and start Serve on it where none runs.

    ClusterError when it does not answer, refuses the token, runs another Ray, or has machines
    that cannot see this home.
    """
    root = home()
    _refuse_own(root)
    cluster = find(wish, root)
    _require_shared(cluster)
    if dry_run:
        say(f"would use {cluster.dashboard} (Ray {cluster.ray}) for {root}")
        return cluster
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".cluster.lock", "the cluster is being started or ended", timeout_s=60):
        local.write_state(cluster, "ready")
    head.start_serve(cluster)
    KeyStore(root / "keys").demo_key()
    say(f"attached {root} to {cluster.dashboard} (Ray {cluster.ray})")
    return cluster


def find(wish: Wish, root: Path) -> Cluster:
    """Ask the cluster who it is. Starts and writes nothing."""
    for url in (wish.dashboard, wish.serve_url):
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path.strip("/"):
            raise ConfigError(f"{url!r:.80} is no address; write it as http://127.0.0.1:8265")
    token = wish.token_file.expanduser().absolute()
    if not token.is_file():
        raise ConfigError(
            f"{token}: no such file; --token-file names the cluster's token, which `roundhouse "
            "config ray-cluster` made"
        )
    if not is_private(token):
        raise ConfigError(f"{token}: others can read this token; chmod 600 it, or renew it")
    asked = Cluster(
        address="",
        dashboard=wish.dashboard.rstrip("/"),
        serve_url=wish.serve_url.rstrip("/"),
        home=root,
        token_file=token,
        temp_dir=Path("/tmp/ray"),  # on the head; `ray up` leaves Ray's own choice
        cluster_id=urlsplit(wish.dashboard).netloc,
        ray=version("ray"),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        ports={
            "gcs": wish.gcs_port,
            "dashboard": _port(wish.dashboard),
            "serve": _port(wish.serve_url),
        },
        scale=scale(wish.ray_cluster) if wish.ray_cluster else (),
    )
    try:
        runs = str(asked.json("GET", "/api/version")["ray_version"])
    except ClusterError as error:
        what = str(error).partition(";")[0].partition(": it died")[0]
        raise ClusterError(
            f"{what}; look at --dashboard (is the tunnel open?) and --token-file"
        ) from None
    if runs != asked.ray:
        raise ClusterError(
            f"{asked.dashboard} runs Ray {runs}, and this is Ray {asked.ray}: drivers need the "
            f"same version; install ray=={runs} here, or start the cluster from this checkout"
        )
    host = next((str(n["address"]) for n in machines(asked) if n["head"]), LOOPBACK)
    return replace(asked, address=f"{host}:{wish.gcs_port}")


def machines(cluster: Cluster) -> list[dict[str, Any]]:
    """Return the living machines: ``address``, and whether it is the ``head``."""
    summary = cluster.json("GET", "/nodes?view=summary")["data"]["summary"]
    raylets = [node.get("raylet") or {} for node in summary]
    return [
        {"address": raylet.get("nodeManagerAddress"), "head": bool(raylet.get("isHeadNode"))}
        for raylet in raylets
        if raylet.get("state") == "ALIVE"
    ]


def scale(path: Path) -> tuple[dict[str, Any], ...]:
    """Return which machines the autoscaler may start: ``name cpus gpus memory_bytes max``."""
    import yaml

    try:
        raw = yaml.safe_load(path.expanduser().read_text())
        types, first = raw.get("available_node_types") or {}, raw.get("head_node_type")
        return tuple(
            {
                "name": str(name),
                "cpus": float(kind["resources"].get("CPU", 0)),
                "gpus": float(kind["resources"].get("GPU", 0)),
                "memory_bytes": int(kind["resources"].get("memory", 0)),
                "max": int(kind.get("max_workers", raw.get("max_workers", 0))),
            }
            for name, kind in sorted(types.items())
            if name != first
        )
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a file that `ray up` reads ({type(error).__name__}: {error}); give the "
            "rendered ray_cluster.yaml"
        ) from None


def is_shared(path: Path, mounts: str | None = None) -> bool:
    """Say whether ``path`` lies on a file system that several machines can have mounted."""
    text = Path("/proc/mounts").read_text() if mounts is None else mounts
    kinds = {line.split()[1]: line.split()[2] for line in text.splitlines() if line.strip()}
    target = path.resolve()
    for place in (target, *target.parents):
        if str(place) in kinds:
            return kinds[str(place)].startswith(SHARED)
    return False


def _require_shared(cluster: Cluster) -> None:
    addresses = {str(node["address"]) for node in machines(cluster)}
    alone = addresses <= _own_addresses() and not cluster.scale
    if not alone and not is_shared(cluster.home):
        raise ClusterError(
            f"ROUNDHOUSE_HOME is {cluster.home}, a disk of this machine alone, and the cluster "
            f"has others ({', '.join(sorted(addresses))}): models, runs and keys must lie where "
            "all of them see them; mount the shared folder of storage.path here, set "
            "ROUNDHOUSE_HOME to it and attach again, or work on the head (`ray attach`)"
        )


def _own_addresses() -> set[str]:
    import psutil

    return {a.address for addresses in psutil.net_if_addrs().values() for a in addresses}


def _refuse_own(root: Path) -> None:
    state = read_state(state_file(root))
    if state and state.get("processes"):
        raise ClusterError(
            f"{root} has a cluster of its own that `roundhouse up` started; `roundhouse down` "
            "ends it, or set ROUNDHOUSE_HOME to another folder"
        )


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)
