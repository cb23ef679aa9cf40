"""The head process itself: its command line, its environment, and when it is ready."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import machine, processes
from cluster.errors import ClusterError
from cluster.ports import LOOPBACK, Ports
from cluster.session import Cluster

START_TIMEOUT_S = 90.0
SERVE_TIMEOUT_S = 90.0

# Unset for the head: they would lead it, or whatever it starts, elsewhere.
DROPPED = (
    "PYTHONPATH",
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_DASHBOARD_ADDRESS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_NAMESPACE",
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_SERVE_ENABLE_HA_PROXY",
    "RAY_START_HOOK",
    "RAY_TMPDIR",
    "RAY_USE_TLS",
)


# Of every process of every cluster of ours: one machine's, or one that `ray up` starts.
EVERYWHERE = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Serve's fast path: less latency and CPU for each streamed token
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # a report waits for the next poll of the controller: 2 s by default
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # from TERM to KILL of a stopped job: long enough for a checkpoint
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}


def environment(
    root: Path, token: Path, cluster_id: str, ports: Ports, environ: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of the head, and so of every process that it ever starts."""
    quiet = f"{LOOPBACK},localhost"
    bypass = environ.get("no_proxy") or environ.get("NO_PROXY")
    return {
        **{name: value for name, value in environ.items() if name not in DROPPED},
        # a job's `python -m train_jobs.finetune` is looked up here
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', os.defpath)}",
        "no_proxy": f"{bypass},{quiet}" if bypass else quiet,
        "NO_PROXY": f"{bypass},{quiet}" if bypass else quiet,
        processes.MARK: cluster_id,
        "ROUNDHOUSE_HOME": str(root),
        **EVERYWHERE,
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        # how old `roundhouse status` and the check before a deploy may be: 5 s by default
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    }


def command(ports: Ports, scratch: Path, here: machine.Machine) -> list[str]:
    """Return the ``ray start`` line."""
    store = machine.object_store(here, scratch / "store")
    line = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
        f"--port={ports.gcs}",
        f"--node-ip-address={LOOPBACK}",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={ports.dashboard}",
        "--include-dashboard=true",
        f"--ray-client-server-port={ports.client}",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--metrics-export-port={ports.metrics}",
        # any free ones: the fixed range of the default would meet another cluster's workers
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--temp-dir={scratch}",
        f"--num-cpus={machine.logical_cpus(here.cores)}",
        f"--object-store-memory={store.size_bytes}",
        "--disable-usage-stats",
    ]
    return [*line, f"--plasma-directory={store.directory}"] if store.directory else line


def start(line: Sequence[str], variables: Mapping[str, str], empty: Path, scratch: Path) -> None:
    """Run ``ray start`` in the ``empty`` directory until it returns, the head then running.

    ClusterError with the end of its log when it fails, or after ``START_TIMEOUT_S``.
    """
    log = scratch / "start.log"
    with log.open("wb") as sink:
        starter = subprocess.Popen(
            line,
            cwd=empty,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to answer, not the head's
        )
        try:
            status = starter.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
    if status != 0:
        how = f"exit {status}" if status is not None else f"not ready in {START_TIMEOUT_S:.0f} s"
        told = log.read_text(errors="replace").splitlines()
        tail = "\n".join(text for text in told if text.strip())[-3000:]
        raise ClusterError(f"the head did not start ({how}); `roundhouse doctor` may help:\n{tail}")


def wait_for_dashboard(cluster: Cluster) -> None:
    """Return when the REST interface answers; ClusterError after ``START_TIMEOUT_S``."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            cluster.json("GET", "/api/version", timeout_s=10.0)
            return
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def start_serve(cluster: Cluster) -> None:
    """Start Serve where none runs. Its port stays what its first starter said: so it is us."""
    route = "/api/serve/applications/"
    if cluster.json("GET", route).get("controller_info"):
        return
    wish: dict[str, Any] = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": LOOPBACK, "port": cluster.ports["serve"]},
        "applications": [],
    }
    deadline = time.monotonic() + SERVE_TIMEOUT_S
    cluster.json("PUT", route, json=wish, timeout_s=SERVE_TIMEOUT_S)
    while True:
        proxies = cluster.json("GET", route).get("proxies") or {}
        states = [str(proxy.get("status")) for proxy in proxies.values()]
        if states and all(state == "HEALTHY" for state in states):
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"Serve's HTTP proxy is not healthy after {SERVE_TIMEOUT_S:.0f} s "
                f"({', '.join(states) or 'no proxy'}); logs: {cluster.temp_dir}"
            )
        time.sleep(0.1)
