"""What runs: nodes, memory, jobs, applications, models. Read over REST, so it takes no driver."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import console
from cluster.errors import ClusterError
from cluster.resources import Node
from cluster.served import in_memory
from cluster.session import Cluster

GIB = 1 << 30


REPORT_TIMEOUT_S = 15.0


def nodes(cluster: Cluster) -> list[Node]:
    """Return the living nodes with what is free on each, as of a second or two ago.

    A head that has just started reports nothing yet: waits up to ``REPORT_TIMEOUT_S`` for it.
    """
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while not (load := _load(cluster)).get("usageByNode"):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the head has reported no node for {REPORT_TIMEOUT_S:.0f} s; `roundhouse down` "
                "and `roundhouse up` start it anew"
            )
        time.sleep(0.2)
    found = []
    for name, usage in sorted(load["usageByNode"].items()):
        cpus_used, cpus = usage.get("CPU", (0.0, 0.0))
        gpus_used, gpus = usage.get("GPU", (0.0, 0.0))
        memory_used, memory = usage.get("memory", (0.0, 0.0))
        found.append(
            Node(
                name=name[:8],
                cpus=cpus,
                cpus_free=cpus - cpus_used,
                gpus=gpus,
                gpus_free=gpus - gpus_used,
                memory_bytes=int(memory),
                memory_free_bytes=int(memory - memory_used),
            )
        )
    return found


def room(cluster: Cluster) -> list[Node]:
    """Return the living nodes, and idle ones for the machines that could still be started."""
    report = (cluster.json("GET", "/api/cluster_status")["data"] or {}).get("clusterStatus") or {}
    active = (report.get("autoscalerReport") or {}).get("activeNodes") or {}
    could = [
        Node(
            name=f"{group['name']} to be started ({index})",
            cpus=group["cpus"],
            cpus_free=group["cpus"],
            gpus=group["gpus"],
            gpus_free=group["gpus"],
            memory_bytes=group["memory_bytes"],
            memory_free_bytes=group["memory_bytes"],
        )
        for group in cluster.scale
        for index in range(int(active.get(group["name"], 0)) + 1, group["max"] + 1)
    ]
    return [*nodes(cluster), *could]


def jobs(cluster: Cluster) -> list[dict[str, Any]]:
    """Return submitted jobs, newest first: ``id status entrypoint started ended`` (ms, epoch)."""
    rows = [
        {
            "id": job.get("submission_id"),
            "status": job.get("status"),
            "entrypoint": job.get("entrypoint"),
            "started": job.get("start_time"),
            "ended": job.get("end_time"),
        }
        for job in cluster.json("GET", "/api/jobs/")
        if job.get("type") == "SUBMISSION"
    ]
    return sorted(rows, key=lambda row: row["started"] or 0, reverse=True)


def applications(cluster: Cluster) -> list[dict[str, Any]]:
    """Return Serve's applications: ``name status route replicas message``."""
    held = cluster.json("GET", "/api/serve/applications/").get("applications") or {}
    return [
        {
            "name": name,
            "status": app.get("status"),
            "route": app.get("route_prefix"),
            "replicas": sum(len(d.get("replicas") or ()) for d in app["deployments"].values()),
            "message": app.get("message") or None,
        }
        for name, app in sorted(held.items())
    ]


def memory(cluster: Cluster) -> list[dict[str, Any]]:
    """Return each node's memory and object store, in bytes: ``node used total store_*``."""
    summary = cluster.json("GET", "/nodes?view=summary")["data"]["summary"]
    usage = _load(cluster).get("usageByNode") or {}
    found = []
    for node in summary:
        name = str(node.get("raylet", {}).get("nodeId", ""))
        total, available = (node.get("mem") or (0, 0))[:2]
        store_used, store = usage.get(name, {}).get("objectStoreMemory", (0.0, 0.0))
        found.append(
            {
                "node": name[:8],
                "used_bytes": total - available,
                "total_bytes": total,
                "store_used_bytes": int(store_used),
                "store_total_bytes": int(store),
            }
        )
    return found


def models(library: Path) -> list[dict[str, Any]]:
    """Return the library's models: ``name versions aliases``."""
    from cluster.library.store import Library

    held = Library(library)
    return [
        {
            "name": name,
            "versions": [version.number for version in held.versions(name)],
            "aliases": held.aliases(name),
        }
        for name in held.names()
    ]


def collect(cluster: Cluster) -> dict[str, Any]:
    """Return everything that ``status`` shows, as one value."""
    apps = applications(cluster)
    return {
        "dashboard": cluster.dashboard,
        "endpoint": f"{cluster.serve_url}/v1",
        "home": str(cluster.home),
        "started": cluster.started,
        "ray": cluster.ray,
        "nodes": [asdict(node) for node in nodes(cluster)],
        "memory": memory(cluster),
        "jobs": jobs(cluster),
        "applications": apps,
        "in_memory": in_memory(cluster) if apps else None,
        "models": models(cluster.home / "library"),
    }


def show(value: dict[str, Any]) -> None:
    """Print what :func:`collect` returned."""
    console.out(f"dashboard  {value['dashboard']}   (Ray {value['ray']}, up {value['started']})")
    console.out(f"endpoint   {value['endpoint']}")
    store = {row["node"]: row for row in value["memory"]}
    rows = []
    for node in value["nodes"]:
        held = store.get(node["name"], {})
        rows.append(
            (
                node["name"],
                f"{node['cpus_free']:g} of {node['cpus']:g}",
                f"{node['gpus_free']:g} of {node['gpus']:g}",
                _gib(held.get("used_bytes"), held.get("total_bytes")),
                _gib(held.get("store_used_bytes"), held.get("store_total_bytes")),
            )
        )
    columns = ("node", "CPUs free", "GPUs free", "memory used", "object store used")
    console.table("nodes", columns, rows)
    console.table(
        "applications",
        ("name", "status", "route", "replicas"),
        [(a["name"], a["status"], a["route"], a["replicas"]) for a in value["applications"]],
    )
    for app in value["applications"]:
        if app["message"] and app["status"] not in {"RUNNING"}:
            console.out(f"  {app['name']}: {app['message'].strip()[-500:]}")
    if value["in_memory"]:
        show_memory(value["in_memory"])
    console.table(
        "jobs",
        ("id", "status", "entrypoint"),
        [(j["id"], j["status"], j["entrypoint"]) for j in value["jobs"][:10]],
    )
    console.table(
        "models",
        ("name", "versions", "aliases"),
        [
            (
                m["name"],
                ", ".join(map(str, m["versions"])),
                ", ".join(f"{alias} -> {number}" for alias, number in m["aliases"].items()) or None,
            )
            for m in value["models"]
        ],
    )


def show_memory(held: dict[str, Any]) -> None:
    """Print what :func:`cluster.served.in_memory` returned."""
    rows = [
        (m["name"], "asleep" if m["asleep"] else "in memory", _gb(m["memory_bytes"]))
        for m in held["models"]
    ]
    console.table("deployed models", ("name", "state", "takes awake"), rows)
    for model in held["models"]:
        for ref, why in model["failed"].items():
            console.out(f"  {model['name']}: {ref} could not be loaded: {why}")
    if held["budget_bytes"] is not None:
        told = f"{_gb(held['used_bytes'])} of {_gb(held['budget_bytes'])}"
        console.out(f"  in memory: {told} that models may take of a node (models_memory_gb)")


def _load(cluster: Cluster) -> dict[str, Any]:
    data = cluster.json("GET", "/api/cluster_status")["data"] or {}
    report = (data.get("clusterStatus") or {}).get("loadMetricsReport")
    return report if isinstance(report, dict) else {}


def _gib(used: float | None, total: float | None) -> str | None:
    return f"{used / GIB:.1f} of {total / GIB:.1f} GiB" if total and used is not None else None


def _gb(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e9:.2f} GB"
