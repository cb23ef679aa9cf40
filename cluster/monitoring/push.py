"""``roundhouse monitor push``: the whole of it, and what is remembered for the next time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.monitoring.dashboard import FOLDER_UID, SOURCE_UID, UID
from cluster.monitoring.grafana import Address, Grafana
from cluster.private import make_private_dir, write_private

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a Grafana holds now."""

    url: str
    """Of the dashboard."""
    version: int
    new_folder: bool
    new_source: bool | None
    """None: data sources were left alone."""


def plan(address: Address, prometheus: str | None, version: int) -> list[str]:
    """Return one line for each thing that a push would do."""
    lines = [f"would make the folder {FOLDER_UID} at {address}, unless it is there"]
    if prometheus:
        lines.append(f"would point the data source {SOURCE_UID} to {prometheus}")
    over = f"over version {version}, which was pushed before" if version else "unless it is there"
    return [*lines, f"would write the dashboard {UID}, {over}"]


def push(
    address: Address, token: str, prometheus: str | None, folder: Path, overwrite: bool, say: Say
) -> Pushed:
    """Send folder, data source and dashboard; ``prometheus`` None leaves data sources alone.

    ``folder`` is where the versions of earlier pushes are remembered: somebody's change in
    Grafana is not overwritten unasked. MonitorError says what went wrong.
    """
    grafana = Grafana(address, token)
    new_folder = grafana.see_to_folder()
    say(f"folder       {FOLDER_UID}{' (new)' if new_folder else ''}")
    new_source = None
    if prometheus:
        new_source = grafana.put_source(prometheus)
        say(f"data source  {SOURCE_UID} -> {prometheus}{' (new)' if new_source else ''}")
    known = remembered(folder)
    version, path = grafana.put_dashboard(known.get(str(address), 0), overwrite)
    make_private_dir(folder)
    write_private(_memory(folder), json.dumps({**known, str(address): version}) + "\n")
    url = f"{address.root}{path}"
    say(f"dashboard    {url} (version {version})")
    return Pushed(url, version, new_folder, new_source)


def remembered(folder: Path) -> dict[str, int]:
    """Return the version of the last push by Grafana's address."""
    try:
        held = json.loads(_memory(folder).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(url): int(version) for url, version in held.items()}


def _memory(folder: Path) -> Path:
    return folder / "pushed.json"
