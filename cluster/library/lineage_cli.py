"""``roundhouse lineage``: from an answer back to its data, and from data to all it touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import console
from cluster.errors import ConfigError
from cluster.options import AsJson, complete_ref

if TYPE_CHECKING:
    from cluster.library.lineage import Ancestor

WIDTH = 12


def lineage(
    ref: Annotated[
        str | None,
        typer.Argument(
            metavar="REF",
            help="name, name@3, name@alias, or an answer's system_fingerprint.",
            autocompletion=complete_ref,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Find every version that this data set touched."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a version was made of, and by whom; or with --data where a data set went."""
    console.use_json(as_json)
    if (ref is None) == (data is None):
        raise ConfigError("lineage: give one of REF, as in tiny@3, and --data HASH")
    from cluster.library.lineage import touched, walk
    from cluster.library.store import Library

    library = Library(trusting=True)
    if ref is not None:
        found = walk(library, ref)
        console.result(_document(found))
        for line in [] if as_json else _lines(found):
            console.out(line)
        return
    assert data is not None
    touches = touched(library, data)
    rows = [(one.ref, one.how, one.what, "" if one.there else "removed") for one in touches]
    if not as_json:
        console.table(f"versions that {data} touched", ("version", "how", "what", ""), rows)
    told = [
        {"ref": one.ref, "there": one.there, "how": one.how, "what": one.what} for one in touches
    ]
    console.result({"data": data, "versions": told})


def _document(found: Ancestor) -> dict[str, Any]:
    manifest = found.manifest
    lineage = manifest.lineage if manifest else None
    return {
        "ref": found.ref,
        "there": found.there,
        "digest": manifest.digest if manifest else None,
        "created": manifest.created if manifest else None,
        "origin": manifest.origin.model_dump() if manifest and manifest.origin else None,
        "run": lineage.run_id if lineage else None,
        "config_hash": lineage.config_hash if lineage else None,
        "code_revision": lineage.code_revision if lineage else None,
        "data": dict(lineage.data_hashes) if lineage else {},
        "metrics": dict(manifest.metrics) if manifest else {},
        "evaluations": [one.model_dump(mode="json") for one in found.evaluations],
        "promoted": [move.model_dump(mode="json") for move in found.moves],
        "made_with": {role: _document(one) for role, one in found.made_with.items()},
    }


def _lines(found: Ancestor, role: str = "", depth: int = 0) -> Iterator[str]:
    indent = "  " * depth
    state = "" if found.there else "  (removed)" if found.manifest else "  (not in this library)"
    if found.there and found.manifest is None:
        state = "  (damaged)"
    yield f"{indent}{f'{role}: ' if role else ''}{found.ref}{state}"
    for label, value in _facts(found):
        yield f"{indent}  {label:<{WIDTH}} {value}"
    for name, one in found.made_with.items():
        yield from _lines(one, name, depth + 1)


def _facts(found: Ancestor) -> Iterator[tuple[str, str]]:
    from cluster.home import runs_dir
    from cluster.library import evaluations

    manifest = found.manifest
    if manifest:
        yield "digest", manifest.digest
        yield "created", manifest.created
        if manifest.origin:
            yield "origin", manifest.origin.source
        if lineage := manifest.lineage:
            folder = runs_dir() / lineage.run_id
            yield "run", lineage.run_id + (f"  ({folder})" if folder.is_dir() else "")
            yield "config hash", lineage.config_hash
            if lineage.code_revision:
                yield "code", lineage.code_revision
            for name, sha256 in lineage.data_hashes.items():
                yield "data", f"{sha256}  {name}"
        for name, value in manifest.metrics.items():
            yield "metric", f"{name} {value:.6g}"
    for what, figures, when in evaluations.lines(found.evaluations):
        yield "evaluated", f"{what}: {figures}  ({when})"
    for move in found.moves:
        before = f" from {move.before}" if move.before else ""
        yield "promoted", f"@{move.alias}{before} by {move.by}, {move.at}"
