"""``roundhouse models sign`` and ``models verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster import console
from cluster.library.disk import readable
from cluster.options import AsJson, DryRun, Ref


def sign(
    ref: Ref,
    key: Annotated[
        Path, typer.Option(metavar="FILE", help="A private elliptic-curve key, as PEM.")
    ],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Sign a version with a key; the signature lies beside it."""
    console.use_json(as_json)
    from cluster.library import signatures
    from cluster.library.store import Library

    library = Library(trusting=True)
    version = library.resolve(ref)
    path = signatures.path_of(library.root, version.name, version.number)
    if dry_run:
        signatures.sign(version, key)  # a key that cannot sign is told now
        console.out(f"would verify {version.ref}, sign it with {key} and write {path}")
    else:
        library.sign(version, key)
        console.out(f"signed {version.ref}: {path}")
    console.result({"dry_run": dry_run, "ref": version.ref, "signature": path})


def verify(
    ref: Ref,
    public_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also check that this key, as PEM, has signed it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read every file of a version again and compare it with manifest and signature."""
    console.use_json(as_json)
    from cluster.library import signatures
    from cluster.library.store import Library

    library = Library(trusting=True)
    version = library.verify(ref)
    files = len(version.manifest.files)
    told = f"{version.ref}: {files} files, {readable(version.manifest.size)}, all as published"
    folder = signatures.trusted()
    keys = [public_key] if public_key else signatures.keys_of(folder) if folder else []
    signer = signatures.check(version, library.root, keys) if keys else None
    if signer:
        told += f"; signed by {signer.name}"
    elif signatures.path_of(library.root, version.name, version.number).exists():
        told += "; there is a signature, to check with --public-key"
    console.out(told)
    console.result({"ref": version.ref, "ok": True, "files": files, "signed_by": signer})
