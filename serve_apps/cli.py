"""The serving verbs of ``roundhouse``: deploy, undeploy, promote, rollback, release, chat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import console
from cluster.options import AsJson, DryRun, Name, complete_ref, complete_version, who
from serve_apps.release_cli import release_app

if TYPE_CHECKING:
    from cluster.session import Cluster
    from serve_apps.config import ServeConfig
    from serve_apps.deploy import Proposal
    from serve_apps.promote import Move

Timeout = Annotated[float, typer.Option(min=1, help="Seconds until it gives up.")]
Alias = Annotated[
    str | None, typer.Option(help="By default the one that the model is deployed with.")
]
Update = Annotated[
    str | None,
    typer.Option(
        help="What becomes of running requests: finish, or recompute those without a token. By "
        "default the model's configuration says it."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (deploy, undeploy, load, unload, promote, rollback, chat):
        app.command()(verb)
    app.add_typer(release_app, name="release")


def deploy(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A file of configs/serve/.")],
    dry_run: DryRun = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field.")
    ] = None,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Serve the models of a file; models of other files stay."""
    console.use_json(as_json)
    from cluster.config import load
    from serve_apps.config import ServeConfig

    wish = load(config, ServeConfig, overrides or [])
    from cluster.library.store import Library
    from cluster.session import current
    from serve_apps.deploy import deploy as carry_out
    from serve_apps.deploy import propose

    library = Library()
    if dry_run:
        cluster = _cluster_or_none()
        _show_proposal(wish, propose(wish, cluster, library), cluster)
        return
    cluster = current()
    proposal = carry_out(wish, cluster, library, timeout, console.out)
    key = cluster.home / "keys" / "demo.key"
    console.out(f"endpoint {cluster.serve_url}/v1, API key in {key}")
    console.result(
        {
            "dry_run": False,
            "endpoint": f"{cluster.serve_url}/v1",
            "key_file": key,
            "changes": [_change(change) for change in proposal.desired.changes],
        }
    )


def undeploy(
    name: Name,
    dry_run: DryRun = False,
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> None:
    """Stop serving a model; its versions and aliases stay in the library."""
    console.use_json(as_json)
    from cluster.session import current
    from serve_apps.deploy import undeploy as carry_out

    changes = carry_out(name, current(), timeout, console.out, dry_run)
    console.result({"dry_run": dry_run, "changes": [_change(change) for change in changes]})


def load(
    name: Name, dry_run: DryRun = False, timeout: Timeout = 120.0, as_json: AsJson = False
) -> None:
    """Bring a deployed model into memory; others leave where the budget wants it."""
    _come_or_go(name, True, timeout, dry_run, as_json)


def unload(
    name: Name, dry_run: DryRun = False, timeout: Timeout = 120.0, as_json: AsJson = False
) -> None:
    """Have a deployed model leave memory once it is idle; its next request brings it back."""
    _come_or_go(name, False, timeout, dry_run, as_json)


def _come_or_go(name: str, load: bool, timeout: float, dry_run: bool, as_json: bool) -> None:
    console.use_json(as_json)
    from serve_apps.loading import move

    if dry_run:
        console.out(f"would {'load' if load else 'unload'} {name}")
    else:
        move(name, load, timeout, console.out)
        console.out(f"{name} is {'in memory' if load else 'out of memory'}")
    console.result({"dry_run": dry_run, "name": name, "asleep": not load})


def promote(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="NAME@NUMBER; a bare name means its newest version.",
            autocompletion=complete_version,
        ),
    ],
    alias: Alias = None,
    pace: Annotated[
        str, typer.Option(help="Replicas that load at once: all, one, or surge, as memory allows.")
    ] = "all",
    update: Update = None,
    timeout: Timeout = 180.0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Put a version live without dropping a request: load it everywhere, then move the alias."""
    console.use_json(as_json)
    from cluster.errors import ConfigError
    from cluster.library.store import Library
    from serve_apps.promote import PACES, wanted

    if pace not in PACES:
        raise ConfigError(f"--pace {pace!r:.20}: one of {', '.join(PACES)}")
    _check_update(update)
    library = Library()
    _move(wanted(ref, alias, library), None, "promote", timeout, dry_run, pace, update)


def rollback(
    name: Name,
    alias: Alias = None,
    update: Update = None,
    timeout: Timeout = 180.0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Go back to the version that the alias named before; once more undoes it."""
    console.use_json(as_json)
    from cluster.library.store import Library
    from serve_apps.promote import previous

    _check_update(update)
    move = previous(name, alias, Library())
    _move(move, move.before, "rollback", timeout, dry_run, update=update)


def _check_update(update: str | None) -> None:
    from cluster.errors import ConfigError
    from serve_apps.promote import UPDATES

    if update not in (None, *UPDATES):
        raise ConfigError(f"--update {update!r:.20}: one of {', '.join(UPDATES)}")


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="By default the only one there is.",
            autocompletion=complete_ref,
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(help="API key; by default the demo key.")] = None,
    base_url: Annotated[str | None, typer.Option(help="By default this home's endpoint.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Bound of an answer; by default the server's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0 takes the likeliest token each time.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model; piped, it answers one question per line."""
    console.use_json(as_json)
    from serve_apps.chat import answer_all, find_endpoint, pick_model, talk

    endpoint = find_endpoint(base_url, key)
    given = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in given.items() if value is not None}
    chosen = pick_model(endpoint, model)
    if as_json:
        console.result({"model": chosen, "answers": answer_all(endpoint, chosen, options)})
    else:
        talk(endpoint, chosen, options)


def _move(
    move: Move,
    expected: int | None,
    verb: str,
    timeout: float,
    dry_run: bool,
    pace: str = "all",
    update: str | None = None,
) -> None:
    from cluster.library.ref import CHAMPION
    from cluster.library.store import Library
    from serve_apps.promote import carry_out

    before = "nothing" if move.before is None else f"version {move.before}"
    step = f"{move.name}@{move.alias or CHAMPION}: {before} -> version {move.to}"
    live = False
    if dry_run:
        console.out(f"would move {step}")
    else:
        console.out(step)
        live = carry_out(move, expected, timeout, who(verb), Library(), console.out, pace, update)
        if live:
            console.out(f"{move.name}@{move.to} answers")
    console.result(
        {
            "dry_run": dry_run,
            "name": move.name,
            "alias": move.alias or CHAMPION,
            "before": move.before,
            "to": move.to,
            "moved": not dry_run,
            "live": live,
        }
    )


def _change(change: Any) -> dict[str, Any]:
    return {"app": change.app, "kind": change.kind, "details": list(change.details)}


def _cluster_or_none() -> Cluster | None:
    from cluster.errors import ClusterError
    from cluster.session import current

    try:
        return current()
    except ClusterError:
        return None


def _show_proposal(wish: ServeConfig, proposal: Proposal, cluster: Cluster | None) -> None:
    import yaml

    plan = str(proposal.fits) if proposal.fits else "unknown: no cluster runs (`roundhouse up`)"
    rendered = {"applications": list(proposal.desired.applications)}
    resolved = wish.model_dump(mode="json")
    console.result(
        {
            "dry_run": True,
            "config": resolved,
            "plan": plan,
            "changes": [_change(change) for change in proposal.desired.changes],
            "aliases": [list(pin) for pin in proposal.pins],
            "serve": rendered,
        }
    )
    if console.is_json():
        return
    console.out("# resolved configuration")
    console.out(yaml.safe_dump(resolved, sort_keys=False).rstrip())
    for name, alias, number in proposal.pins:
        console.out(f"# would set {name}@{alias} to version {number}")
    for change in proposal.desired.changes:
        console.out(f"# {change}")
    console.out(f"# plan: {plan}")
    address = cluster.dashboard if cluster else "http://127.0.0.1:8265"
    console.out(f"# serve deploy --address {address} serve.yaml, with this as serve.yaml")
    console.out("# (the code package must be in the cluster's store: this verb uploads it)")
    console.out(yaml.safe_dump(rendered, sort_keys=False).rstrip())
