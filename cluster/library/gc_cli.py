"""``roundhouse models gc``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cluster import console
from cluster.errors import ConfigError
from cluster.library.disk import readable
from cluster.options import AsJson, DryRun


def gc(
    keep: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Also remove versions, but for the newest N of each model, those that an alias "
            "points to or did just before, and what these were made with.",
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what killed processes left, and with --keep old versions that nobody needs."""
    console.use_json(as_json)
    from cluster.library.garbage import collect, garbage_of, retire, unneeded
    from cluster.library.store import Library

    library = Library(trusting=True)
    old = unneeded(library, keep) if keep is not None else []
    if old and not dry_run and not yes:
        told = f"{console.counted(len(old), 'version')}: {', '.join(v.ref for v in old[:8])}"
        if console.is_plain() or as_json:
            raise ConfigError(
                f"gc --keep {keep}: would remove {told}; nobody can be asked here; see with "
                "--dry-run and confirm with --yes"
            )
        typer.confirm(f"remove {told}? What is served by its number may be among them", abort=True)
    gone, stayed = ([garbage_of(v) for v in old], []) if dry_run else retire(library, old)
    gone = [*collect(library, dry_run), *gone]
    total = sum(one.size for one in gone)
    if not as_json:
        rows = [(one.what, one.where, readable(one.size)) for one in gone]
        console.table("garbage", ("what", "where", "size"), rows)
    for why in stayed:
        console.out(f"stays: {why}")
    would = "would free" if dry_run else "freed"
    console.out(f"{would} {readable(total)} ({console.counted(len(gone), 'thing')})")
    console.result(
        {
            "dry_run": dry_run,
            "removed": [asdict(one) for one in gone],
            "stayed": stayed,
            "bytes": total,
        }
    )
