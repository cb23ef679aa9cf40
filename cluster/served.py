"""Which deployed models are in memory, as the gateway tells whoever has this home's key."""

from __future__ import annotations

from typing import Any

from cluster.errors import ClusterError
from cluster.session import Cluster

TIMEOUT_S = 5.0
"""A gateway that is being rebuilt must not keep `status` waiting."""


def in_memory(cluster: Cluster) -> dict[str, Any] | None:
    """Return ``models`` (``name asleep memory_bytes failed``), ``used_bytes``, ``budget_bytes``.

    Bytes are those of one node, of each model where it takes most; ``memory_bytes`` is what a
    model takes while it is awake, as its replicas say every five seconds; ``failed`` what it could
    not load, and why. ``None`` where no gateway answers.
    """
    listed = _models(cluster)
    if listed is None:
        return None
    found = [
        {
            "name": str(one["root"] or one["id"]).partition("@")[0],
            "asleep": bool(one["asleep"]),
            "memory_bytes": one.get("memory_bytes"),
            "failed": dict(one.get("failed") or {}),
        }
        for one in sorted(listed, key=lambda one: str(one["id"]))
        if "parent" not in one  # adapters live in their base's memory
    ]
    return {
        "models": found,
        "used_bytes": sum(m["memory_bytes"] or 0 for m in found if not m["asleep"]),
        "budget_bytes": _budget(cluster),
    }


def _models(cluster: Cluster) -> list[dict[str, Any]] | None:
    import requests

    try:
        key = (cluster.home / "keys" / "demo.key").read_text().strip()
        with requests.Session() as session:
            session.trust_env = False  # no proxy for loopback
            session.headers["Authorization"] = f"Bearer {key}"
            answer = session.get(f"{cluster.serve_url}/v1/models", timeout=TIMEOUT_S)
            answer.raise_for_status()
            listed: list[dict[str, Any]] = answer.json()["data"]
    except (OSError, ValueError, KeyError, requests.RequestException):
        return None
    return listed


def _budget(cluster: Cluster) -> int | None:
    """Return the bytes that models may take of a node: what the gateway was deployed with."""
    try:
        apps = cluster.json("GET", "/api/serve/applications/").get("applications") or {}
    except ClusterError:
        return None
    for app in apps.values():
        for one in (app.get("deployed_app_config") or {}).get("deployments") or ():
            limits = (one.get("user_config") or {}).get("limits") or {}
            if limits.get("models_memory_gb") is not None:
                return int(limits["models_memory_gb"] * 1e9)
    return None
