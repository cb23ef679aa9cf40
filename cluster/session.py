"""The way to the cluster: its address, its token, its REST interface, and the only ``ray.init``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError
from cluster.home import home
from cluster.package import CodePackage, Package, code_root, pack
from cluster.ports import LOOPBACK

if TYPE_CHECKING:
    import requests

NAMESPACE = "roundhouse"
DETACHED = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "num_cpus": 0,
    "max_restarts": -1,
}
"""Of an actor with a name that outlives whoever made it, and comes back after its own death."""
STATE_SCHEMA = 1
# Ray hands this to the driver of a submitted job and to nobody else.
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
MANAGED = frozenset({"RAY_", "OMP_", "ROUNDHOUSE_", "HF_", "TOKENIZERS_", "PYTHONHASHSEED"})

UP = "run `roundhouse up`"


@dataclass(frozen=True, slots=True)
class Cluster:
    """One running cluster, as ``up`` wrote it down in ``<home>/cluster.json``."""

    address: str
    """``host:port`` of the GCS, for drivers."""
    dashboard: str
    """http URL of the dashboard, for jobs, Serve and state."""
    serve_url: str
    """http URL of the OpenAI-compatible endpoint, without ``/v1``."""
    home: Path
    token_file: Path
    temp_dir: Path
    cluster_id: str
    ray: str
    """Ray's version."""
    started: str
    """UTC, ISO 8601."""
    ports: Mapping[str, int]
    processes: tuple[Mapping[str, Any], ...] = ()
    """The head's own: ``pid``, ``born`` (seconds since the epoch), ``name``; none when somebody
    else started the cluster and this home is attached to it."""
    scale: tuple[Mapping[str, Any], ...] = ()
    """Machines that an autoscaler may start: ``name cpus gpus memory_bytes max``."""

    def token(self) -> str:
        """Return the bearer token; ClusterError when its file is gone."""
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"the cluster's token {self.token_file} cannot be read ({error.strerror}); "
                "`roundhouse down` and `roundhouse up` make a new one"
            ) from None

    def http(
        self,
        method: str,
        path: str,
        json: Any = None,
        data: bytes | None = None,
        timeout_s: float = 30.0,
    ) -> requests.Response:
        """Call the dashboard's REST interface and return the answer, whatever its status.

        ``timeout_s`` bounds the connection and each wait for bytes. ClusterError when nobody
        answers, or the token is refused (401, 403).
        """
        import requests

        with requests.Session() as session:
            # no proxy for loopback, and no .netrc that would overwrite the token
            session.trust_env = False
            session.headers["Authorization"] = f"Bearer {self.token()}"
            try:
                answer = session.request(
                    method, f"{self.dashboard}{path}", json=json, data=data, timeout=timeout_s
                )
            except requests.Timeout:
                raise ClusterError(
                    f"the head at {self.dashboard} did not answer {method} {path} within "
                    f"{timeout_s:g} s; look at `roundhouse status`, or {UP}, which mends it"
                ) from None
            except requests.RequestException:
                raise ClusterError(
                    f"the head at {self.dashboard} does not answer: it died, or the machine was "
                    f"restarted; {UP}, which mends it"
                ) from None
        if answer.status_code in {401, 403}:
            raise ClusterError(
                f"the head at {self.dashboard} refused the token of {self.token_file} "
                f"({answer.status_code}); another cluster listens there, or the file was "
                "changed: `roundhouse down`, then `roundhouse up`"
            )
        return answer

    def json(self, method: str, path: str, **options: Any) -> Any:
        """Call :meth:`http` and return the decoded body; ClusterError on any status but 2xx."""
        answer = self.http(method, path, **options)
        if not answer.ok:
            raise ClusterError(
                f"the head at {self.dashboard} answered {method} {path} with "
                f"{answer.status_code}: {answer.text[:2000].strip()}"
            )
        return answer.json() if answer.content else None


def state_file(root: Path | None = None) -> Path:
    """Return where the running cluster is written down."""
    return (root or home()) / "cluster.json"


def read_state(path: Path) -> dict[str, Any] | None:
    """Return what ``up`` wrote down, or ``None``; ClusterError when it is not a state file."""
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ClusterError(f"{path} cannot be read ({error}); {UP}, which mends it") from None
    if not isinstance(state, dict) or state.get("schema") != STATE_SCHEMA:
        raise ClusterError(f"{path} was written by another version of Roundhouse; {UP} to mend it")
    return state


def current() -> Cluster:
    """Return the cluster of this home; ClusterError when there is none, or it is half started.

    This reads one file. Whether the head still answers shows at the first call.
    """
    path = state_file()
    state = read_state(path)
    if state is None:
        raise ClusterError(f"no cluster runs for {path.parent}; {UP}")
    if state.get("state") != "ready":
        raise ClusterError(
            f"the cluster of {path.parent} is starting, or its start was interrupted; wait, or {UP}"
        )
    return from_state(state)


def from_state(state: Mapping[str, Any]) -> Cluster:
    """Build the value from the decoded file."""
    try:
        return Cluster(
            address=state["address"],
            dashboard=state["dashboard"],
            serve_url=state["serve_url"],
            home=Path(state["home"]),
            token_file=Path(state["token_file"]),
            temp_dir=Path(state["temp_dir"]),
            cluster_id=state["cluster_id"],
            ray=state["ray"],
            started=state["started"],
            ports=dict(state["ports"]),
            processes=tuple(state["processes"]),
            scale=tuple(state.get("scale", ())),
        )
    except (KeyError, TypeError) as error:
        raise ClusterError(f"cluster.json lacks {error}; {UP}, which mends it") from None


def driver_environment(cluster: Cluster) -> dict[str, str]:
    """Return what a driver, ``ray job submit`` or ``serve deploy`` needs in its environment."""
    # Without it Ray takes loopback for a mistake and uses the routable address instead; with it
    # no other machine may join, so it is for the cluster of one machine only.
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token_file),
        **(loopback if cluster.address.startswith(f"{LOOPBACK}:") else {}),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ADDRESS": cluster.address,
        "RAY_API_SERVER_ADDRESS": cluster.dashboard,
        "ROUNDHOUSE_HOME": str(cluster.home),
    }


def connect(cluster: Cluster | None = None, package: CodePackage | None = None) -> None:
    """Make this process a driver of the cluster; a second call does nothing.

    In the driver of a submitted job, Ray's own variables say where to go. Elsewhere ``cluster``
    (by default the running one) does, and with ``package`` the workers import the shipped code
    instead of this process's directory. Call it before anything imports ray: Ray reads some of
    this environment while it is imported. ClusterError when the head does not answer.
    """
    inside = IN_JOB in os.environ
    if not inside:
        cluster = cluster or current()
        cluster.http("GET", "/api/gcs_healthz", timeout_s=10.0)
        os.environ.pop("RAY_AUTH_TOKEN", None)  # would win over the token's file
        os.environ.update(driver_environment(cluster))
    import ray

    if ray.is_initialized():
        return
    env = runtime_env(package, {}) if package else None
    try:
        ray.init(
            address=None if cluster is None else cluster.address,
            namespace=NAMESPACE,
            runtime_env=env,
            logging_level="warning",
        )
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        where = cluster.address if cluster else os.environ.get("RAY_ADDRESS", "the job's cluster")
        raise ClusterError(f"cannot join the cluster at {where}: {error}; {UP}") from error


def upload_code(cluster: Cluster) -> CodePackage:
    """Put this code into the cluster's own package store, unless it is there, and name it.

    The store drops a package ten minutes after the last use of it; asking for it, as this does,
    starts the ten minutes anew, so submit soon afterwards.
    """
    package: Package = pack(code_root())
    route = f"/api/packages/gcs/{package.code.name}"
    known = cluster.http("GET", route, timeout_s=30.0)
    if known.status_code == 404:
        stored = cluster.http("PUT", route, data=package.archive, timeout_s=120.0)
        if not stored.ok:
            raise ClusterError(
                f"the cluster did not take the code package ({len(package.archive)} bytes): "
                f"{stored.status_code} {stored.text[-500:]}"
            )
    elif not known.ok:
        raise ClusterError(f"the package store failed: {known.status_code} {known.text[-500:]}")
    return package.code


def runtime_env(package: CodePackage, env_vars: Mapping[str, str]) -> dict[str, Any]:
    """Return Ray's runtime environment: the shipped code and variables of known prefixes.

    Nothing else can be said here: no pip, no container, no hook. Values are readable by whoever
    holds the token, so a secret goes as the path of its file. ClusterError on another name.
    """
    for name in env_vars:
        if not name.startswith(tuple(MANAGED)) or name.startswith("RAY_AUTH_TOKEN"):
            raise ClusterError(
                f"environment variable {name!r} cannot be sent to the cluster; allowed are names "
                f"that start with {', '.join(sorted(MANAGED))}, without the token"
            )
    return {"working_dir": package.uri, "env_vars": dict(env_vars)}
