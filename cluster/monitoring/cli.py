"""``roundhouse monitor ...``: up, push, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster import console
from cluster.errors import ConfigError, MonitorError
from cluster.options import AsJson, DryRun

monitor = typer.Typer(help="Prometheus and Grafana.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.add_typer(monitor, name="monitor")


@monitor.command()
def up(
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Of Prometheus; 0 for any. By default 9090 or next."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write the files for this cluster and start Prometheus on them; `roundhouse down` ends it."""
    console.use_json(as_json)
    import shutil

    from cluster.monitoring import server
    from cluster.monitoring.files import DASHBOARD, rendered
    from cluster.session import current

    cluster = current()
    folder = server.directory(cluster.home)
    if dry_run:
        held = server.running(cluster.home)
        at = held.port if held else server.choose_port(port)
        files = [str(folder / name) for name in rendered(server.place(cluster, at))]
        for name in files:
            console.out(f"would write {name}")
        program = shutil.which(server.PROGRAM)
        line = server.command(program, folder, at) if program and not held else None
        if held:
            console.out(f"Prometheus runs already: {held.url} (pid {held.pid})")
        else:
            console.out(f"would run: {' '.join(line)}" if line else server.INSTALL)
        console.result({"dry_run": True, "files": files, "command": line})
        return
    started = server.up(cluster, port, console.out)
    console.out(f"configuration  {folder / 'prometheus.yml'}")
    console.out(f"for Grafana    {folder / 'grafana' / 'provisioning'}")
    console.out(f"dashboard      {folder / DASHBOARD}")
    if started:
        console.out(f"Prometheus     {started.url}  (pid {started.pid}; `roundhouse down` ends it)")
    else:
        console.out(server.INSTALL)
    console.result(
        {
            "directory": folder,
            "prometheus": started.url if started else None,
            "pid": started.pid if started else None,
            "say": None if started else server.INSTALL,
        }
    )


@monitor.command()
def push(
    url: Annotated[str, typer.Option(help="Grafana: http(s)://HOST[:PORT][/PREFIX].")],
    token: Annotated[
        str | None,
        typer.Option(
            envvar="ROUNDHOUSE_GRAFANA_TOKEN",
            help="Of a service account; a file is safer: other users see command lines.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File that holds the token and nothing else.")
    ] = None,
    prometheus: Annotated[
        str | None,
        typer.Option(help="Prometheus as Grafana reaches it; by default the one of `monitor up`."),
    ] = None,
    source: Annotated[
        bool, typer.Option("--source/--no-source", help="Whether to write the data source.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a dashboard that was changed in Grafana.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Send dashboard, folder and data source to a Grafana."""
    console.use_json(as_json)
    from dataclasses import asdict

    from cluster.home import home
    from cluster.monitoring import push as pushing
    from cluster.monitoring import server
    from cluster.monitoring.files import EXAMPLE
    from cluster.monitoring.grafana import Address

    address = Address.parse(url)
    secret = _token(token, token_file)
    folder = server.directory(home())
    held = server.running(home())
    at = (prometheus or (held.url if held else EXAMPLE.prometheus)) if source else None
    if address.is_open:
        console.note(f"the token travels to {address} unencrypted: use https where you can")
    if dry_run:
        known = pushing.remembered(folder).get(str(address), 0)
        lines = pushing.plan(address, at, known)
        for line in lines:
            console.out(line)
        console.result({"dry_run": True, "plan": lines})
        return
    console.result(asdict(pushing.push(address, secret, at, folder, overwrite, console.out)))


@monitor.command()
def render(
    write: Annotated[
        bool, typer.Option("--write", help="Write what differs; by default only say it.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(help="Directory; by default configs/monitoring of the checkout.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare configs/monitoring/ with what the code says; exit 1 where it differs."""
    console.use_json(as_json)
    from cluster.home import checkout
    from cluster.monitoring.files import EXAMPLE, rendered

    root = checkout()
    folder = to or (root / "configs" / "monitoring" if root else None)
    if folder is None:
        raise ConfigError("this is not a checkout: say where with --to DIRECTORY")
    differ = []
    for name, text in rendered(EXAMPLE).items():
        path = folder / name
        if path.is_file() and path.read_text() == text:
            continue
        differ.append(str(path))
        console.out(f"{'wrote' if write else 'differs'} {path}")
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if not differ:
        console.out(f"{folder} is what the code says")
    console.result({"directory": folder, "differ": differ, "written": write})
    if differ and not write:
        raise typer.Exit(1)


def _token(given: str | None, path: Path | None) -> str:
    if (given is None) == (path is None):
        raise MonitorError("give the token of a Grafana service account once: --token-file FILE")
    if path is not None:
        try:
            given = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise MonitorError(f"--token-file {path} cannot be read: {error}") from None
    if not given or not given.isascii() or not given.isprintable() or " " in given:
        raise MonitorError("the token is empty, or more than one word of plain characters")
    return given
