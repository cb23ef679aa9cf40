"""``roundhouse``: the platform's verbs; the other packages bring theirs by entry point."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from cluster import console
from cluster.config_cli import config_app
from cluster.errors import RoundhouseError
from cluster.options import AsJson, DryRun
from cluster.weights.cli import shelf

if TYPE_CHECKING:
    from cluster.keys import KeyStore

GROUP = "roundhouse.commands"

app = typer.Typer(
    name="roundhouse",
    help="Fine-tune and serve language models on one Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys of the endpoint.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(config_app, name="config")
app.add_typer(shelf, name="shelf")


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
    as_json: AsJson = False,
) -> None:
    """Start the one-machine cluster, or say that it runs."""
    console.use_json(as_json)
    from cluster import local

    if dry_run:
        _rehearsed(lambda say: local.rehearse(port or [], say))
        return
    cluster = local.up(port or [], console.out)
    key = cluster.home / "keys" / "demo.key"
    console.out(f"Ray dashboard   {cluster.dashboard}  (log in with the token in the file")
    console.out(f"                {cluster.token_file})")
    console.out(f"endpoint        {cluster.serve_url}/v1")
    console.out(f"API key         {key}  (a file)")
    console.out("stop            roundhouse down")
    console.result(
        {
            "dashboard": cluster.dashboard,
            "token_file": cluster.token_file,
            "endpoint": f"{cluster.serve_url}/v1",
            "key_file": key,
            "home": cluster.home,
            "ports": dict(cluster.ports),
        }
    )


@app.command()
def down(dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """End what `up` started; library, runs and keys stay."""
    console.use_json(as_json)
    from cluster import local

    if dry_run:
        _rehearsed(local.rehearse_down)
    else:
        console.result({"ended": local.down(console.out)})


@app.command()
def attach(
    dashboard: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="Its dashboard, or a tunnel to it."
        ),
    ],
    token_file: Annotated[
        Path,
        typer.Option(envvar="RAY_AUTH_TOKEN_PATH", metavar="FILE", help="Holds its token."),
    ] = Path("~/.ray/auth_token"),
    serve: Annotated[
        str, typer.Option(metavar="URL", help="Its endpoint, or a tunnel to it.")
    ] = "http://127.0.0.1:8000",
    gcs_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of its GCS.")] = 6379,
    ray_cluster: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `ray up` read: the machines it may start."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Use a cluster that `ray up` started; `down` lets go of it."""
    console.use_json(as_json)
    from cluster.attach import Wish
    from cluster.attach import attach as carry_out

    wish = Wish(dashboard, serve, token_file, gcs_port, ray_cluster)
    cluster = carry_out(wish, console.out, dry_run)
    console.result(
        {
            "dry_run": dry_run,
            "address": cluster.address,
            "dashboard": cluster.dashboard,
            "endpoint": f"{cluster.serve_url}/v1",
            "home": cluster.home,
            "ray": cluster.ray,
            "could_start": list(cluster.scale),
        }
    )


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show nodes, memory, applications, jobs and models."""
    console.use_json(as_json)
    from cluster import status as report
    from cluster.session import current

    value = report.collect(current())
    if not as_json:
        report.show(value)
    console.result(value)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check what the product needs here, and say how to fix what is missing."""
    console.use_json(as_json)
    from dataclasses import asdict

    from cluster import doctor as report

    checks = report.examine()
    failed = any(check.state == "fail" for check in checks)
    if not as_json:
        report.show(checks)
    console.result({"ok": not failed, "checks": [asdict(check) for check in checks]})
    if failed:
        raise typer.Exit(1)


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    admin: Annotated[
        bool, typer.Option("--admin", help="It may also load and unload models.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make an API key and show it, this once."""
    console.use_json(as_json)
    from cluster.keys import check_name

    store = _keys()
    if dry_run:
        check_name(name)
        console.out(f"would add a key called {name} to {store.path}")
        console.result({"dry_run": True, "name": name, "file": store.path})
        return
    plaintext = store.add(name, admin)
    if not as_json:
        console.out(plaintext)
    console.note("keep it: only its hash is stored")
    console.result({"name": name, "key": plaintext})


@keys_app.command("list")
def keys_list(as_json: AsJson = False) -> None:
    """List the keys: id, name, last four characters, when made."""
    console.use_json(as_json)
    held = _keys().list()
    if not as_json:
        rows = [(k.id, k.name, f"...{k.last4}", k.created) for k in held]
        console.table("API keys", ("id", "name", "ends in", "created"), rows)
    console.result(
        {
            "keys": [
                {"id": k.id, "name": k.name, "last4": k.last4, "created": k.created} for k in held
            ]
        }
    )


def _complete_key(incomplete: str) -> list[tuple[str, str]]:
    return [(key.id, key.name) for key in _keys().list() if key.id.startswith(incomplete)]


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="As `keys list` shows it, or a name that one key has.",
            autocompletion=_complete_key,
        ),
    ],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove a key; the next request with it is refused."""
    console.use_json(as_json)
    store = _keys()
    key = store.find(key_id) if dry_run else store.revoke(key_id)
    console.out(f"{'would revoke' if dry_run else 'revoked'} {key.id} ({key.name})")
    console.result({"dry_run": dry_run, "id": key.id, "name": key.name})


def _rehearsed(rehearse: Callable[[Callable[[str], None]], None]) -> None:
    """Print the lines of a rehearsal, and as JSON their list."""
    plan: list[str] = []

    def say(line: str) -> None:
        console.out(line)
        plan.append(line)

    rehearse(say)
    console.result({"dry_run": True, "plan": plan})


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
            entry.load()(target)
        except (ImportError, AttributeError, SyntaxError) as error:
            why = f"{type(error).__name__}: {error}"
            console.error(f"the verbs of {entry.module} are missing: {why} (`make install`?)")


def main() -> None:
    """Run the command line: exit 0, 1 with one line, 2 for wrong usage, 130 for Ctrl-C."""
    console.use_json("--json" in sys.argv[1:])  # for what goes wrong before a verb begins
    try:
        plug_in(app)
        status = app(prog_name="roundhouse", standalone_mode=False)
    except RoundhouseError as error:
        console.failure(type(error).__name__, str(error))
        status = 1
    except BrokenPipeError:
        # whoever read our output has gone; so that Python does not tell it again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if (told := _state_trouble(error)) is None:
            raise
        console.failure("ClusterError", told)
        status = 1
    except TyperException as error:
        _tell_usage(error)
        status = error.exit_code
    except typer.Abort:
        console.failure("Aborted", "nothing was done")
        status = 1
    except KeyboardInterrupt:
        status = 130
    if status == 130:
        console.note("interrupted")
    if status:
        sys.exit(status)


def _state_trouble(error: OSError) -> str | None:
    """Say what to do about a state directory that cannot be used; ``None`` for other files."""
    from cluster.home import home

    if error.filename is None or not Path(str(error.filename)).is_relative_to(home()):
        return None
    return (
        f"{error.filename}: {error.strerror}; models, runs and keys are kept in {home()}: make "
        "it a folder that you may write to, or set ROUNDHOUSE_HOME to one"
    )


def _tell_usage(error: TyperException) -> None:
    """Tell a wrong verb, option or argument: the value, what there is, where more is said."""
    ctx = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError" and hasattr(error, "show"):
        error.show()  # the help itself
        return
    told = error.format_message().strip().rstrip(".?")
    told = told[:1].lower() + told[1:]
    if ctx is None:
        console.failure("UsageError", told)
        return
    verbs = getattr(ctx.command, "commands", None)
    if verbs and "Did you mean" not in told and told.startswith("no such command"):
        told += f"; there are {', '.join(sorted(verbs))}"
    told = told.replace(". Did you mean", "; did you mean")
    console.failure("UsageError", f"{told}; see `{ctx.command_path} --help`")


if __name__ == "__main__":
    main()
