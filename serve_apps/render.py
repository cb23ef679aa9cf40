"""From our configuration to Serve's, and what a deploy would change. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from cluster.resources import Demand
from serve_apps.config import (
    FRONT_CPUS,
    GATEWAY,
    GATEWAY_APP,
    BuildArgs,
    GatewayArgs,
    GatewaySettings,
    Limits,
    ModelArgs,
    ModelConfig,
    ServeConfig,
    model_app,
)

IMPORT_PATH = "serve_apps.app:build"
ENV_VARS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""For the fronts, which compute nothing; an engine sets its own threads."""

App = dict[str, Any]
COMPARED = ("import_path", "runtime_env", "args", "deployments")


def model_entry(model: ModelConfig, revision: str, runtime_env: Mapping[str, Any]) -> App:
    """Return Serve's entry for one model: no route, found by its name."""
    args = BuildArgs(app=ModelArgs(revision=revision, model=model))
    return {
        "name": model_app(model.name),
        "route_prefix": None,
        "import_path": IMPORT_PATH,
        "runtime_env": deepcopy(dict(runtime_env)),
        "args": args.model_dump(mode="json"),
    }


def gateway_entry(
    limits: Limits, models: Sequence[str], revision: str, runtime_env: Mapping[str, Any]
) -> App:
    """Return Serve's entry for the gateway.

    Limits and models stand in ``user_config``, not in ``args``: changing them then reconfigures
    the running gateway instead of replacing it.
    """
    settings = GatewaySettings(limits=limits, models=tuple(sorted(models)))
    return {
        "name": GATEWAY_APP,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "runtime_env": deepcopy(dict(runtime_env)),
        "args": BuildArgs(app=GatewayArgs(revision=revision)).model_dump(mode="json"),
        "deployments": [{"name": GATEWAY, "user_config": settings.model_dump(mode="json")}],
    }


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one application."""

    app: str
    kind: str
    """``add``, ``change``, ``remove`` or ``keep``."""
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        sign = {"add": "+", "change": "~", "remove": "-", "keep": "="}[self.kind]
        told = f": {'; '.join(self.details)}" if self.details else ""
        return f"{sign} {self.app}{told}"


@dataclass(frozen=True, slots=True)
class Desired:
    """The whole state that Serve is asked for, and how it differs from what runs."""

    applications: tuple[App, ...]
    changes: tuple[Change, ...]


def deploy_state(
    running: Mapping[str, App], config: ServeConfig, revision: str, runtime_env: Mapping[str, Any]
) -> Desired:
    """Merge a file's models into what runs: models of other files stay as they are."""
    mine = {model_app(m.name): model_entry(m, revision, runtime_env) for m in config.models}
    wanted = {**{n: a for n, a in running.items() if n != GATEWAY_APP}, **mine}
    gateway = gateway_entry(config.limits, model_names(wanted), revision, runtime_env)
    return _desired(running, {GATEWAY_APP: gateway, **wanted})


def undeploy_state(running: Mapping[str, App], name: str) -> Desired:
    """Return the state without a model; with the last model the gateway goes too."""
    wanted = {n: a for n, a in running.items() if n != model_app(name)}
    names = model_names(wanted)
    if not names:
        wanted.pop(GATEWAY_APP, None)
    elif GATEWAY_APP in wanted:
        old = wanted[GATEWAY_APP]
        settings = _settings(old).model_copy(update={"models": tuple(sorted(names))})
        deployments = [{"name": GATEWAY, "user_config": settings.model_dump(mode="json")}]
        wanted[GATEWAY_APP] = {**old, "deployments": deployments}
    return _desired(running, wanted)


def model_names(apps: Mapping[str, App]) -> list[str]:
    """Return the models among applications, sorted."""
    prefix = model_app("")
    return sorted(name.removeprefix(prefix) for name in apps if name.startswith(prefix))


def demands(entry: App) -> list[Demand]:
    """Return what an application reserves; nothing for one that is not ours."""
    try:
        app = BuildArgs.model_validate(entry.get("args")).app
    except ValueError:
        return []
    if isinstance(app, GatewayArgs):
        return [Demand("gateway", FRONT_CPUS)]
    model = app.model
    return [
        Demand(
            f"model {model.name}",
            cpus=bundle["CPU"],
            gpus=bundle.get("GPU", 0.0),
            count=model.replicas,
        )
        for bundle in model.bundles
    ]


def _settings(entry: App) -> GatewaySettings:
    for deployment in entry.get("deployments") or ():
        if deployment.get("name") == GATEWAY and deployment.get("user_config"):
            return GatewaySettings.model_validate(deployment["user_config"])
    return GatewaySettings()


def _desired(running: Mapping[str, App], wanted: Mapping[str, App]) -> Desired:
    changes = []
    for name in sorted({*running, *wanted}):
        if name not in running:
            changes.append(Change(name, "add"))
        elif name not in wanted:
            changes.append(Change(name, "remove"))
        else:
            details = tuple(_differences(running[name], wanted[name]))
            changes.append(Change(name, "change" if details else "keep", details))
    return Desired(tuple(wanted[name] for name in sorted(wanted)), tuple(changes))


def _differences(old: App, new: App) -> Iterator[str]:
    before, after = _flat(old), _flat(new)
    for key in sorted({*before, *after}):
        if before.get(key) == after.get(key):
            continue
        if key.endswith("revision"):
            yield "new code"
        elif not key.startswith("runtime_env"):
            field = key.removeprefix("args.app.").removeprefix("settings.")
            yield f"{field} {before.get(key)} -> {after.get(key)}"


def _flat(entry: App) -> dict[str, Any]:
    """Return what of an entry counts, one key for each leaf; Serve adds defaults of its own."""
    value: dict[str, Any] = {key: entry.get(key) for key in COMPARED if key != "deployments"}
    if entry.get("name") == GATEWAY_APP:
        value["settings"] = _settings(entry).model_dump(mode="json")
    return dict(_leaves(value))


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{at}.{key}" if at else str(key))
    else:
        yield at, value
