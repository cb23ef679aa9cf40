"""``roundhouse models push`` and ``models pull``, and what ``models list --at`` tells."""

from __future__ import annotations

import getpass
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import console
from cluster.library.disk import readable
from cluster.options import AsJson, DryRun, Ref

if TYPE_CHECKING:
    from cluster.library.mirror import Copied

Url = Annotated[
    str,
    typer.Argument(
        metavar="URL", help="s3://bucket/library, gs://bucket/library or file:///folder/library."
    ),
]


def push(
    ref: Ref,
    url: Url,
    alias: Annotated[
        str | None, typer.Option(help="Point this alias at it, there, when it is whole.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Copy a version to a bucket, under its own name and number; an adapter with its base."""
    console.use_json(as_json)
    from cluster.library.mirror import push as carry_out
    from cluster.library.remote import Remote
    from cluster.library.store import Library

    library, remote = Library(), Remote(url)
    version = library.resolve(ref)
    before = remote.aliases(version.name)[0].aliases.get(alias) if alias else None
    if dry_run:
        there = version.number in remote.numbers(version.name)
        told = f"{version.ref} ({readable(version.manifest.size)})"
        console.out(f"{'has' if there else 'would push'} {told}: {remote.url}")
        console.result({"dry_run": True, "ref": version.ref, "there": there})
        return
    done = carry_out(library, version, remote, console.note)
    _tell(done, "pushed", "is there already")
    if alias:
        if before != version.number:
            by = getpass.getuser()
            remote.move_alias(version.name, alias, version.number, before, by)
        console.out(f"{version.name}@{alias} points to {version.ref} in {remote.url}")
    told_as = {"ref": version.ref, "versions": [asdict(one) for one in done], "alias": alias}
    console.result({"dry_run": False, **told_as})


def pull(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="name, name@3 or name@alias, as it is there.")
    ],
    url: Url,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Copy a version from a bucket, under its own name and number; an adapter with its base."""
    console.use_json(as_json)
    from cluster.library.mirror import pull as carry_out
    from cluster.library.ref import Ref as Parsed
    from cluster.library.references import ref_of
    from cluster.library.remote import Remote
    from cluster.library.store import Library

    library, remote = Library(), Remote(url)
    if dry_run:
        manifest, _ = remote.resolve(Parsed.parse(ref))
        there = library.holds(manifest) is not None
        told = f"{ref_of(manifest)} ({readable(manifest.size)})"
        console.out(f"{'has' if there else 'would pull'} {told}")
        console.result({"dry_run": True, "ref": ref_of(manifest), "there": there})
        return
    done = carry_out(library, Parsed.parse(ref), remote, console.note)
    _tell(done, "pulled", "is here already")
    versions = [asdict(one) for one in done]
    console.result({"dry_run": False, "ref": done[-1].ref, "versions": versions})


def list_at(url: str, as_json: bool) -> None:
    """Tell the versions and aliases behind a URL."""
    from cluster.library.ref import Ref as Parsed
    from cluster.library.remote import Remote

    remote = Remote(url)
    found = []
    for name in remote.names():
        pointed = remote.aliases(name)[0].aliases
        for number in remote.numbers(name):
            manifest, _ = remote.resolve(Parsed(name, number))
            aliases = sorted(alias for alias, to in pointed.items() if to == number)
            found.append((f"{name}@{number}", aliases, manifest.dtype, manifest.size))
    if not as_json:
        rows = [(ref, ", ".join(aliases) or "-", d, readable(n)) for ref, aliases, d, n in found]
        console.table(f"models in {url}", ["version", "aliases", "dtype", "size"], rows)
    fields = ("ref", "aliases", "dtype", "bytes")
    console.result({"url": url, "models": [dict(zip(fields, one, strict=True)) for one in found]})


def _tell(done: list[Copied], verb: str, already: str) -> None:
    for one in done:
        told = f"{verb} {one.ref} ({readable(one.size)})" if one.new else f"{one.ref} {already}"
        console.out(told)
