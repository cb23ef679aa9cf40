"""``roundhouse shelf ...``: what lies on the weight shelf, and taking something off it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cluster import console
from cluster.errors import UnknownModel
from cluster.options import AsJson, DryRun

shelf = typer.Typer(help="The weight shelf: versions in the object store.", no_args_is_help=True)
Reference = Annotated[
    str, typer.Argument(metavar="REF", help="name@3, or a running job's name@run.ID.STEP.")
]


@shelf.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show the versions on each node's shelf, their bytes and who uses them."""
    console.use_json(as_json)
    nodes = _status()
    rows = [
        (
            node[:8],
            ref,
            f"{told['bytes'] / 1e6:,.0f} MB",
            told["users"],
            _why_here(told),
        )
        for node, status in sorted(nodes.items())
        for ref, told in sorted(status["versions"].items())
    ]
    if not as_json:
        console.table("versions on the shelf", ("node", "version", "size", "users", ""), rows)
        for node, status in sorted(nodes.items()):
            spilled = f", {status['spilled'] / 1e6:,.0f} MB of it spilled to disk"
            console.out(
                f"{node[:8]}: {status['bytes'] / 1e6:,.0f} of {status['budget'] / 1e6:,.0f} MB"
                f"{spilled if status['spilled'] else ''}"
            )
    console.result({"nodes": nodes})


@shelf.command("rm")
def remove(ref: Reference, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Take a version off every node's shelf; who has loaded it keeps what it loaded."""
    console.use_json(as_json)
    told = {node: status["versions"].get(ref) for node, status in _status().items()}
    having = [node for node, one in told.items() if one and not one["form"]]
    if not having:
        raise UnknownModel(f"{ref} is on no shelf; `roundhouse shelf list` says what is")
    if not dry_run:
        from cluster.weights.client import withdraw

        withdraw(ref)
    where = console.counted(len(having), "node")
    console.out(f"{'would take' if dry_run else 'took'} {ref} off the shelf of {where}")
    console.result({"ref": ref, "nodes": having, "dry_run": dry_run})


def _why_here(told: dict[str, Any]) -> str:
    if told["form"]:
        return "as ranks read it"
    return "an alias means it" if told["pinned"] else "" if told["users"] else "may go"


def _status() -> dict[str, dict[str, Any]]:
    """Return what each agent tells; none is made for it."""
    from cluster.session import connect, current

    connect(current())
    from cluster.weights.actors import CALL_S, agents, asked

    return {node: asked(agent.status.remote(), CALL_S) for node, agent in agents().items()}
