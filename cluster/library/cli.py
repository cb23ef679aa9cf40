"""``roundhouse models ...``: import, list, show, verify, sign, export, push, pull, rm, gc."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import console
from cluster.errors import ConfigError, Corrupt, LibraryError
from cluster.library.disk import readable
from cluster.library.gc_cli import gc
from cluster.library.lineage_cli import lineage
from cluster.library.mirror_cli import list_at, pull, push
from cluster.library.sign_cli import sign, verify
from cluster.options import AsJson, DryRun, Ref, complete_version

if TYPE_CHECKING:
    from cluster.library.importers import Report
    from cluster.library.store import Library, Version

models = typer.Typer(help="The model library.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(lineage)
    app.add_typer(models, name="models")


@models.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A directory, a .gguf file, package:NAME (a model that an installed package "
            "carries), or org/name[@revision].",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Its name in the library.")] = None,
    random_weights: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            min=0,
            help="Draw the weights of a directory with config and tokenizer only.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Bring a model into the library; what is there already is not copied again."""
    console.use_json(as_json)
    from cluster.library.importers import import_model
    from cluster.library.source import parse_source

    library = _library()
    if dry_run:
        found = parse_source(source)
        chosen = name or found.default_name
        has = [version.ref for version in library.versions(chosen)]
        console.out(f"would import {found.where} ({found.kind}) as {chosen} into {library.root}")
        console.out(f"{chosen} has {', '.join(has) or 'no version yet'}")
        console.result({"dry_run": True, "source": found.where, "name": chosen, "versions": has})
        return
    with _progress() as report:
        imported = import_model(library, source, name, report, random_weights)
    version = imported.version
    if imported.new:
        console.out(f"imported {version.ref}: {_described(version)}")
        for note in version.manifest.notes:
            console.out(f"  {note}")
    else:
        console.out(f"{version.ref} is there already, with the same content")
    console.result({**_summary(library, version), "new": imported.new})


@models.command("list")
def list_(
    at: Annotated[
        str | None, typer.Option(metavar="URL", help="What lies in this bucket instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every version in the library."""
    console.use_json(as_json)
    if at is not None:
        list_at(at, as_json)
        return
    library = _library(trusting=True)
    found = [version for name in library.names() for version in library.versions(name)]
    console.result({"models": [_summary(library, version) for version in found]})
    if as_json:
        return
    rows = []
    for version in found:
        manifest = version.manifest
        made = f"trained from {manifest.base}" if manifest.lineage else "imported"
        aliases = ", ".join(_aliases(library, version)) or "-"
        told = (_parameters(version), manifest.dtype, readable(manifest.size), made)
        rows.append((version.ref, aliases, *told))
    console.table("models", ["version", "aliases", "parameters", "dtype", "size", "made"], rows)
    if not rows:
        console.out("add one with `roundhouse models import SOURCE`")


@models.command()
def show(ref: Ref, as_json: AsJson = False) -> None:
    """Show what is known about one version."""
    console.use_json(as_json)
    from cluster.library import evaluations, signatures

    library = _library(trusting=True)
    version = library.resolve(ref)
    manifest = version.manifest
    signature = signatures.path_of(library.root, version.name, version.number)
    history = [move for move in library.alias_history(version.name) if move.to == version.number]
    measured = library.evaluations(version)
    if as_json:
        document = manifest.model_dump(mode="json")
        document |= _summary(library, version)
        document["alias_history"] = [move.model_dump(mode="json") for move in history]
        document["evaluations"] = [one.model_dump(mode="json") for one in measured]
        console.result(document)
        return
    console.out(f"{version.ref}: {_described(version)}")
    made, origin = manifest.lineage, manifest.origin
    lines = {
        "aliases": ", ".join(_aliases(library, version)),
        "path": version.path,
        "created": manifest.created,
        "origin": origin.source if origin else None,
        "base": manifest.base,
        "run": made.run_id if made else None,
        "config hash": made.config_hash if made else None,
        "code": made.code_revision if made else None,
        "licence": manifest.licence,
        "digest": manifest.digest,
        "signature": signature if signature.exists() else None,
    }
    lines |= made.models if made else {}
    lines |= {f"data {file}": sha for file, sha in (made.data_hashes if made else {}).items()}
    lines |= {f"metric {key}": f"{value:.6g}" for key, value in manifest.metrics.items()}
    for label, value in lines.items():
        if value:
            console.out(f"  {label:<12} {value}")
    for note in manifest.notes:
        console.out(f"  {'note':<12} {note}")
    for move in history:
        console.out(
            f"  {'alias moved':<12} @{move.alias} from {move.before} by {move.by}, {move.at}"
        )
    if measured:
        told = evaluations.lines(measured)
        console.table("evaluations", ["of what", "figures with 95% intervals", "when"], told)
    rows = [(file, readable(entry.size), entry.sha256) for file, entry in manifest.files.items()]
    console.table("files", ["file", "size", "sha256"], rows)


@models.command()
def rm(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="One version by number, as name@3.",
            autocompletion=complete_version,
        ),
    ],
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete one version; its number is not used again."""
    console.use_json(as_json)
    from cluster.library import ref as refs

    library = _library(trusting=True)
    parsed = refs.Ref.parse(ref)
    if parsed.version is None:
        raise LibraryError(f"{ref}: name the version to remove, as in {parsed.name}@3")
    try:
        version = library.get(parsed.name, parsed.version)
        what = f"{version.ref} ({readable(version.manifest.size)}, {version.path})"
    except Corrupt as error:  # a damaged version is what one most wants to remove
        what = f"{ref}, which is damaged ({error})"
    library.check_unneeded(parsed)
    if dry_run:
        console.out(f"would remove {what}")
        console.result({"dry_run": True, "ref": ref})
        return
    if not yes:
        if console.is_plain() or as_json:
            raise ConfigError(f"rm {ref}: nobody can be asked here; confirm with --yes")
        typer.confirm(f"remove {what}?", abort=True)
    library.remove(parsed)
    console.out(f"removed {ref}")
    console.result({"dry_run": False, "ref": ref})


@models.command()
def export(
    ref: Ref,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory to create.")],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Copy a version into a directory that every Hugging Face loader reads."""
    console.use_json(as_json)
    library = _library()
    version = library.resolve(ref)
    if dry_run:
        console.out(f"would copy {version.ref} ({readable(version.manifest.size)}) to {directory}")
    else:
        library.export(version, directory)
        console.out(f"copied {version.ref} to {directory}")
    console.result({"dry_run": dry_run, "ref": version.ref, "directory": directory.absolute()})


for _verb in (verify, sign, push, pull, gc):  # they have files of their own
    models.command()(_verb)


def _library(trusting: bool = False) -> Library:
    from cluster.library.store import Library

    return Library(trusting=trusting)


@contextmanager
def _progress() -> Iterator[Report]:
    """Yield what shows a line of progress: a spinner in a terminal, plain lines elsewhere."""
    if console.is_plain():
        yield console.note
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("reading the source") as status:
        yield lambda text: status.update(escape(text))


def _summary(library: Library, version: Version) -> dict[str, Any]:
    manifest = version.manifest
    return {
        "ref": version.ref,
        "name": version.name,
        "version": version.number,
        "aliases": _aliases(library, version),
        "kind": manifest.kind,
        "base": manifest.base,
        "dtype": manifest.dtype,
        "parameters": manifest.architecture.parameters,
        "bytes": manifest.size,
        "created": manifest.created,
        "path": str(version.path),
        "digest": manifest.digest,
    }


def _aliases(library: Library, version: Version) -> list[str]:
    pointed = library.aliases(version.name)
    return sorted(alias for alias, number in pointed.items() if number == version.number)


def _described(version: Version) -> str:
    manifest = version.manifest
    parts = [
        manifest.architecture.model_type,
        f"{_parameters(version)} parameters",
        manifest.dtype,
        readable(manifest.size),
        None if manifest.tokenizer else "no tokenizer",
        None if manifest.chat_template else "no chat template",
    ]
    return ", ".join(part for part in parts if part)


def _parameters(version: Version) -> str:
    count = version.manifest.architecture.parameters or 0
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return str(count)
