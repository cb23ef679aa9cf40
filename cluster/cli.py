"""``roundhouse``: the platform's verbs; the other packages bring theirs by entry point."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version
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
) -> None:
    """Start the one-machine cluster, or say that it runs."""
    from cluster import local

    cluster = local.up(port or [], console.out)
    console.out(f"Ray dashboard   {cluster.dashboard}  (log in with the token in the file")
    console.out(f"                {cluster.token_file})")
    console.out(f"endpoint        {cluster.serve_url}/v1")
    console.out(f"API key         {cluster.home / 'keys' / 'demo.key'}  (a file)")
    console.out("stop            roundhouse down")


@app.command()
def down() -> None:
    """End what `up` started; library, runs and keys stay."""
    from cluster import local

    local.down(console.out)


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


def plug_in(target: typer.Typer) -> None:
    """Let every package of the group add its verbs; one that is broken is told, not hidden."""
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            register = entry.load()
        except ModuleNotFoundError as error:
            if error.name != entry.module:
                raise
            console.note(f"warning: {entry.module} is missing; its verbs are not there")
            continue
        register(target)


def main() -> None:
    """Run the command line: exit 0, 1 with one line, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        plug_in(app)
        app(prog_name="roundhouse")
    except RoundhouseError as error:
        console.error(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        console.note("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
