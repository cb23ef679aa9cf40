"""``roundhouse deploy`` and ``undeploy``: the merged desired state, submitted and awaited."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import ClusterError, ConfigError, Conflict, UnknownModel
from cluster.library.ref import NEWEST
from cluster.library.store import Library
from cluster.package import CodePackage, code_root, pack
from cluster.resources import Demand, Node, Plan, plan
from cluster.session import Cluster, runtime_env, upload_code
from cluster.status import room
from serve_apps.config import GATEWAY_APP, ModelConfig, ServeConfig, model_app
from serve_apps.engine.partition import check_directory
from serve_apps.render import (
    ENV_VARS,
    App,
    Change,
    Desired,
    demands,
    deploy_state,
    model_names,
    undeploy_state,
)

ROUTE = "/api/serve/applications/"
POLL_S = 0.25
TELL_S = 5.0
DEAD_STATES = {"DEPLOY_FAILED", "UNHEALTHY"}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a deploy would do."""

    desired: Desired
    fits: Plan | None
    """``None`` when there is no cluster to fit into."""
    pins: tuple[tuple[str, str, int], ...]
    """Aliases that do not exist yet: name, alias, and the version that each will name."""
    failed: tuple[str, ...] = ()
    """Applications that run broken and are submitted anew."""


def propose(config: ServeConfig, cluster: Cluster | None, library: Library) -> Proposal:
    """Work out what a deploy would do; changes nothing. UnknownModel, ConfigError."""
    pins = [pin for model in config.models if (pin := missing_alias(model, library))]
    for model in config.models:
        check_ranks(model, library)
        check_adapters(model, library)
    package = pack(code_root()).code
    held = state(cluster) if cluster else {}
    running = submitted(held)
    desired = deploy_state(running, config, package.revision, _environment(package))
    fits = _plan(cluster, running, desired) if cluster else None
    mine = {GATEWAY_APP, *(model_app(model.name) for model in config.models)}
    broken = tuple(n for n in sorted(mine) if held.get(n, {}).get("status") in DEAD_STATES)
    return Proposal(desired, fits, tuple(pins), broken)


def missing_alias(model: ModelConfig, library: Library) -> tuple[str, str, int] | None:
    """Return the alias that a model needs and does not have, with the version to give it.

    Raises UnknownModel when the library has no version of the model at all.
    """
    if model.alias in library.aliases(model.name):
        library.resolve(f"{model.name}@{model.alias}")  # what it names must exist
        return None
    newest = library.versions(model.name)[-1:] or [library.resolve(model.name)]
    return model.name, model.alias, newest[0].number


def check_ranks(model: ModelConfig, library: Library) -> None:
    """Raise ConfigError when the model that would answer does not divide among its ranks."""
    if model.engine.kind == "fake":
        return
    known = model.alias in library.aliases(model.name)
    version = library.resolve(f"{model.name}@{model.alias}" if known else model.name)
    check_directory(version.path, model.engine.tensor_parallel, version.ref)


def check_adapters(model: ModelConfig, library: Library) -> None:
    """Raise ConfigError when a named adapter is none, or is not there and no run will bring it."""
    for name in model.adapter_names:
        try:
            kind = library.resolve(name).manifest.kind
        except UnknownModel as error:
            if name in model.live_adapters:
                continue  # its run is still to put it on the shelf
            raise ConfigError(
                f"adapters of {model.name}: {error}; train it with publish: {{name: {name}, "
                f"merge: false}} or import it first, or write {name}@{NEWEST} to serve what a run "
                "puts on the shelf"
            ) from None
        if kind != "adapter":
            raise ConfigError(
                f"adapters of {model.name}: {name} is a model, not an adapter; deploy it by itself "
                "as one of `models`, or take it out of `adapters`"
            )


def deploy(
    config: ServeConfig, cluster: Cluster, library: Library, timeout_s: float, say: Say
) -> Proposal:
    """Submit the merged state and wait until it answers. Raises ClusterError when it does not."""
    until = time.monotonic() + timeout_s
    proposal = propose(config, cluster, library)
    if proposal.fits:
        proposal.fits.require()
    for name, alias, number in proposal.pins:
        try:
            library.move_alias(name, alias, number, None, "deploy")
            say(f"{name}@{alias} is version {number} from now on")
        except Conflict:
            say(f"{name}@{alias} was set by somebody else a moment ago")
    for change in proposal.desired.changes:
        say(str(change))
    upload_code(cluster)
    if proposal.failed:
        # unchanged, Serve would not try again; so take it away first
        rest = [a for a in proposal.desired.applications if a["name"] not in proposal.failed]
        _submit(cluster, rest)
        _await_gone(cluster, proposal.failed, until, timeout_s)
    _submit(cluster, proposal.desired.applications)
    names = [GATEWAY_APP, *(model_app(model.name) for model in config.models)]
    _await_running(cluster, names, until, timeout_s, say)
    _await_ready(cluster, until, timeout_s)
    return proposal


def undeploy(
    name: str, cluster: Cluster, timeout_s: float, say: Say, dry_run: bool
) -> tuple[Change, ...]:
    """Take a model away and wait until it is gone. ConfigError when it is not deployed."""
    until = time.monotonic() + timeout_s
    running = submitted(state(cluster))
    if model_app(name) not in running:
        there = ", ".join(model_names(running)) or "none"
        raise ConfigError(f"{name!r:.80} is not deployed; deployed: {there}")
    desired = undeploy_state(running, name)
    for change in desired.changes:
        say(str(change))
    if not dry_run:
        _submit(cluster, desired.applications)
        gone = [change.app for change in desired.changes if change.kind == "remove"]
        _await_gone(cluster, gone, until, timeout_s)
        if GATEWAY_APP not in gone:  # it must know, too, before anybody is told
            _await_running(cluster, [GATEWAY_APP], until, timeout_s, lambda _: None)
    return desired.changes


def state(cluster: Cluster) -> dict[str, Any]:
    """Return Serve's applications with everything that it knows about them."""
    return dict(cluster.json("GET", ROUTE).get("applications") or {})


def submitted(held: Mapping[str, Any]) -> dict[str, App]:
    """Return the entries that were submitted for the applications that run."""
    return {
        name: app["deployed_app_config"]
        for name, app in held.items()
        if app.get("deployed_app_config") and app.get("status") != "DELETING"
    }


def _environment(package: CodePackage) -> dict[str, Any]:
    return runtime_env(package, ENV_VARS)


def _plan(cluster: Cluster, running: Mapping[str, App], desired: Desired) -> Plan:
    """Plan what is added or replaced; what it replaces is free by then."""
    kinds = {change.app: change.kind for change in desired.changes}
    wanted: list[Demand] = []
    freed: list[Demand] = []
    for entry in desired.applications:
        if kinds[entry["name"]] == "keep":
            continue
        wanted += demands(entry)
        freed += demands(running.get(entry["name"], {}))
    return plan(wanted, _with(room(cluster), freed))


def _with(there: Sequence[Node], freed: Sequence[Demand]) -> list[Node]:
    """Return the nodes with the demands' resources given back, as far as they have them."""
    free = list(there)
    for demand in freed:
        for _ in range(demand.count):
            for index, node in enumerate(free):
                if node.cpus_free + demand.cpus <= node.cpus:
                    free[index] = replace(
                        node,
                        cpus_free=node.cpus_free + demand.cpus,
                        gpus_free=node.gpus_free + demand.gpus,
                    )
                    break
    return free


def _submit(cluster: Cluster, applications: Sequence[App]) -> None:
    # the HTTP options repeat what `up` started Serve with: Serve warns about any others
    http = {"host": "127.0.0.1", "port": cluster.ports["serve"]}
    wish = {
        "proxy_location": "HeadOnly",
        "http_options": http,
        "applications": list(applications),
    }
    cluster.json("PUT", ROUTE, json=wish, timeout_s=60.0)


def _await_running(
    cluster: Cluster, names: Sequence[str], until: float, timeout_s: float, say: Say
) -> None:
    began = told = time.monotonic()
    seen: dict[str, str] = {}
    while True:
        held = state(cluster)
        now = {name: str(held.get(name, {}).get("status", "NOT_STARTED")) for name in names}
        for name, status in now.items():
            if seen.get(name) != status:
                say(f"{name}: {status.lower().replace('_', ' ')}")
            if status in DEAD_STATES:
                raise ClusterError(_failure(name, held[name], cluster))
        seen = now
        if all(status == "RUNNING" for status in now.values()):
            return
        clock = time.monotonic()
        if clock > until:
            waiting = [n for n, status in now.items() if status != "RUNNING"]
            why = "; ".join(_failure(n, held.get(n, {}), cluster) for n in waiting)
            raise ClusterError(f"not running after {timeout_s:g} s (--timeout): {why}")
        if clock - told > TELL_S:
            told = clock
            for name, status in now.items():
                if status != "RUNNING":
                    said = _reason(held.get(name, {})) or "starting"
                    say(f"{name}: {said}, {clock - began:.0f} s of {timeout_s:g} s")
        time.sleep(POLL_S)


def _await_gone(cluster: Cluster, names: Sequence[str], until: float, timeout_s: float) -> None:
    while left := sorted(set(names) & set(state(cluster))):
        if time.monotonic() > until:
            raise ClusterError(f"{', '.join(left)} still there after {timeout_s:g} s (--timeout)")
        time.sleep(POLL_S)


def _await_ready(cluster: Cluster, until: float, timeout_s: float) -> None:
    import requests

    with requests.Session() as session:
        session.trust_env = False
        while True:
            try:
                if session.get(f"{cluster.serve_url}/readyz", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass  # the proxy learns of a new route within a second; the bound is below
            if time.monotonic() > until:
                raise ClusterError(
                    f"the applications run, but {cluster.serve_url}/readyz does not say so after "
                    f"{timeout_s:g} s (--timeout); `roundhouse status` shows them"
                )
            time.sleep(0.05)


def _failure(name: str, app: Mapping[str, Any], cluster: Cluster) -> str:
    logs = cluster.temp_dir / "session_latest" / "logs" / "serve"
    return f"{name}: {_reason(app) or 'no reason given'} (logs: {logs})"


def _reason(app: Mapping[str, Any]) -> str:
    """Return the line of a message that says what went wrong, without its traceback."""
    messages = [str(d.get("message") or "") for d in (app.get("deployments") or {}).values()]
    for message in [*messages, str(app.get("message") or "")]:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        errors = [line for line in lines if _is_exception(line)]
        if errors:
            return errors[-1].partition(": ")[2][:600] or errors[-1]
        if lines and "Traceback" not in message:
            return lines[0][:600]
    return ""


def _is_exception(line: str) -> bool:
    head = line.partition(":")[0]
    return (
        head.replace(".", "").replace("_", "").isalnum()
        and (head[:1].isalpha())
        and ("Error" in head or head.startswith("cluster.errors."))
    )
