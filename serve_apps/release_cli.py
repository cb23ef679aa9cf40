"""``roundhouse release ...``: start, status, stop, approve."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import console
from cluster.options import AsJson, DryRun, Name, complete_name, complete_version

if TYPE_CHECKING:
    from cluster.library.releases import Entry, Release
    from serve_apps.release_config import ReleasePolicy

POLL_S = 1.0
CALL_S = 30.0

release_app = typer.Typer(
    help="Put a version in the champion's place step by step.", no_args_is_help=True
)


@release_app.command("start")
def release_start(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="The candidate, NAME@NUMBER.", autocompletion=complete_version
        ),
    ],
    policy: Annotated[
        Path | None,
        typer.Option(help="A file of configs/releases/; without one its defaults hold."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Tell what happens until it is over; 1 when it failed.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Give a version a growing share of the requests, and the champion's place if all holds."""
    console.use_json(as_json)
    from cluster.config import build, load
    from cluster.library.store import Library
    from serve_apps.promote import wanted
    from serve_apps.release_config import ReleasePolicy

    given = overrides or []
    rules = load(policy, ReleasePolicy, given) if policy else build({}, ReleasePolicy, given)
    move = wanted(ref, None, Library())
    if dry_run:
        _show_plan(f"{move.name}@{move.to}", rules)
        return
    record: Release = _call("start_release", move.name, move.to, rules, _who())
    console.out(_line(record))
    if wait:
        record = _follow(record)
    else:
        console.out(f"see how it goes: roundhouse release status {move.name}")
    console.result(record.model_dump(mode="json"))
    if wait and record.moved.what == "rolled_back":
        raise typer.Exit(1)


@release_app.command("status")
def release_status(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="By default all models.", autocompletion=complete_name),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the record of a model's last release: every step, and why."""
    console.use_json(as_json)
    from cluster.library import releases as records
    from cluster.library.store import Library

    library = Library()
    if name is not None:
        library.resolve(name)  # an unknown name is told as such
    names = library.names() if name is None else [name]
    found = [record for one in names for record in records.of(library.root, one)[-1:]]
    for record in found:
        console.out(_line(record))
        for entry in record.entries:
            console.out(f"  {_told(entry)}")
        if not record.over and (why := _waits_for(record.name)):
            console.out(f"  now: {why}")
    if not found:
        console.out("no release yet; `roundhouse release start NAME@NUMBER` begins one")
    console.result({"releases": [record.model_dump(mode="json") for record in found]})


@release_app.command("stop")
def release_stop(name: Name, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Roll a release back at once: the champion answers everything."""
    _act(name, "stop_release", "roll back", dry_run, as_json)


@release_app.command("approve")
def release_approve(name: Name, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Let a release pass whose evaluations are missing, or show no difference."""
    _act(name, "approve_release", "approve", dry_run, as_json)


def _act(name: str, method: str, what: str, dry_run: bool, as_json: bool) -> None:
    console.use_json(as_json)
    if dry_run:
        _rehearse(name, what)
        return
    record: Release = _call(method, name, _who())
    console.out(_line(record))
    console.out(f"  {_told(record.entries[-1])}")
    console.result(record.model_dump(mode="json"))


def _rehearse(name: str, what: str) -> None:
    """Say what would be done to the release that runs. ReleaseError where none does."""
    from cluster.errors import ReleaseError
    from cluster.library import releases as records
    from cluster.library.store import Library

    library = Library()
    library.resolve(name)  # an unknown name is told as such
    record = next(iter(records.of(library.root, name)[-1:]), None)
    if record is None or record.over:
        raise ReleaseError(f"no release of {name} runs; `roundhouse release status {name}` tells")
    console.out(f"would {what}: {_line(record)}")
    console.result({"dry_run": True, **record.model_dump(mode="json")})


def _call(method: str, *args: Any) -> Any:
    """Ask the Releases actor; its refusals are raised as they are."""
    from cluster.errors import ReleaseError, RoundhouseError
    from cluster.session import connect, current

    connect(current())
    import ray

    from serve_apps.releases_actor import find_releases

    actor = find_releases()
    if actor is None:
        raise ReleaseError("nothing is deployed; `roundhouse deploy CONFIG` serves a model")
    try:
        return ray.get(getattr(actor, method).remote(*args), timeout=CALL_S)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        known = isinstance(cause, RoundhouseError)
        raise (cause if known else ReleaseError(str(cause))) from None
    except ray.exceptions.RayError as error:
        raise ReleaseError(
            f"the Releases actor did not answer ({type(error).__name__}); see `roundhouse release "
            "status`, then repeat"
        ) from None


def _waits_for(name: str) -> str:
    """Return what the actor says; nothing where there is none, since the record says the rest."""
    from cluster.errors import RoundhouseError

    try:
        return str(_call("release_waits_for", name))
    except RoundhouseError:
        return ""


def _follow(record: Release) -> Release:
    """Print each entry as it comes, until the release is over."""
    from cluster.library import releases as records
    from cluster.library.store import Library

    root, told = Library().root, 0
    while True:
        for entry in record.entries[told:]:
            console.out(f"  {_told(entry)}")
        told = len(record.entries)
        if record.over:
            return record
        time.sleep(POLL_S)
        record = next(r for r in records.of(root, record.name) if r.number == record.number)


def _line(record: Release) -> str:
    state = record.moved.what.replace("_", " ")
    return (
        f"release {record.number} of {record.ref} (champion {record.name}@{record.champion}): "
        f"{state}"
    )


def _told(entry: Entry) -> str:
    at = entry.at.partition("T")[2].partition("+")[0]
    share = "" if entry.step is None else f" {entry.percent:g} %"
    return f"{at} {entry.what.replace('_', ' ')}{share}: {entry.why}"


def _show_plan(ref: str, rules: ReleasePolicy) -> None:
    import yaml

    resolved = rules.model_dump(mode="json")
    console.out(f"# would release {ref} by this policy")
    console.out(yaml.safe_dump(resolved, sort_keys=False).rstrip())
    console.result({"dry_run": True, "ref": ref, "policy": resolved})


def _who() -> str:
    return os.environ.get("USER") or os.environ.get("LOGNAME") or "release"
