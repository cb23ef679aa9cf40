"""``roundhouse``: the platform's verbs; the other packages bring theirs by entry point."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points, version
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import console
from cluster.errors import ConfigError, RoundhouseError

if TYPE_CHECKING:
    from cluster.keys import KeyStore

GROUP = "roundhouse.commands"
# Names, so that listing them loads none; resolved when asked for, on this side of no import.
SCHEMAS = {"serve": "serve_apps.config:ServeConfig", "train": "train_jobs.config:FinetuneConfig"}

app = typer.Typer(
    name="roundhouse",
    help="Fine-tune and serve language models on one Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys of the endpoint.", no_args_is_help=True)
config_app = typer.Typer(help="What a configuration file may say.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(config_app, name="config")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]


def _version(wanted: bool) -> None:
    if wanted:
        console.out(f"roundhouse {version('roundhouse')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def up(
    port: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="gcs, dashboard, serve, client, agent, metrics ...; 0 for any free one; `any`.",
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Start the one-machine cluster, or say that it runs."""
    from cluster import local

    if dry_run:
        local.rehearse(port or [], console.out)
        return
    cluster = local.up(port or [], console.out)
    console.out(f"Ray dashboard   {cluster.dashboard}  (log in with the token in the file")
    console.out(f"                {cluster.token_file})")
    console.out(f"endpoint        {cluster.serve_url}/v1")
    console.out(f"API key         {cluster.home / 'keys' / 'demo.key'}  (a file)")
    console.out("stop            roundhouse down")


@app.command()
def down(dry_run: DryRun = False) -> None:
    """End what `up` started; library, runs and keys stay."""
    from cluster import local

    if dry_run:
        local.rehearse_down(console.out)
    else:
        local.down(console.out)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show nodes, memory, applications, jobs and models."""
    from cluster import status as report
    from cluster.session import current

    value = report.collect(current())
    if as_json:
        console.emit_json(value)
    else:
        report.show(value)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check what the product needs here, and say how to fix what is missing."""
    from dataclasses import asdict

    from cluster import doctor as report

    checks = report.examine()
    if as_json:
        console.emit_json([asdict(check) for check in checks])
    else:
        report.show(checks)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


@keys_app.command("add")
def keys_add(name: str, as_json: AsJson = False) -> None:
    """Make an API key and show it, this once."""
    plaintext = _keys().add(name)
    if as_json:
        console.emit_json({"name": name, "key": plaintext})
    else:
        console.out(plaintext)
        console.note("keep it: only its hash is stored")


@keys_app.command("list")
def keys_list(as_json: AsJson = False) -> None:
    """List the keys: id, name, last four characters, when made."""
    held = _keys().list()
    if as_json:
        console.emit_json(
            [{"id": k.id, "name": k.name, "last4": k.last4, "created": k.created} for k in held]
        )
        return
    rows = [(k.id, k.name, f"...{k.last4}", k.created) for k in held]
    console.table("API keys", ("id", "name", "ends in", "created"), rows)


@keys_app.command("revoke")
def keys_revoke(key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Remove a key; the next request with it is refused."""
    key = _keys().revoke(key_id)
    console.out(f"revoked {key.id} ({key.name})")


@config_app.command("schema")
def config_schema(kind: Annotated[str, typer.Argument(help=", ".join(SCHEMAS))]) -> None:
    """Print the JSON schema of one folder of configs/, for editors."""
    from importlib import import_module

    from cluster.config import schema_json

    if kind not in SCHEMAS:
        raise ConfigError(f"no schema {kind!r:.40}; there are: {', '.join(SCHEMAS)}")
    module, _, name = SCHEMAS[kind].partition(":")
    console.out(schema_json(getattr(import_module(module), name)).rstrip())


def _keys() -> KeyStore:
    from cluster.home import keys_dir
    from cluster.keys import KeyStore

    return KeyStore(keys_dir())


def plug_in(target: typer.Typer, entries: Iterable[EntryPoint] | None = None) -> None:
    """Let every package of the group add its verbs.

    One that cannot be loaded is told as an error on standard error and its verbs are missing;
    the others still work, so that `roundhouse down` always does.
    """
    found = entry_points(group=GROUP) if entries is None else entries
    for entry in sorted(found, key=lambda entry: entry.name):
        try:
            register = entry.load()
        except (ImportError, AttributeError, SyntaxError) as error:
            why = f"{type(error).__name__}: {error}"
            console.error(f"the verbs of {entry.module} are missing: {why} (`make install`?)")
            continue
        register(target)


def main() -> None:
    """Run the command line: exit 0, 1 with one line, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        plug_in(app)
        app(prog_name="roundhouse")
    except RoundhouseError as error:
        console.failure(type(error).__name__, str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        status = 130
    except SystemExit as ending:
        if ending.code != 130:
            raise
        status = 130
    else:
        return
    console.note("interrupted")
    sys.exit(status)


if __name__ == "__main__":
    main()
