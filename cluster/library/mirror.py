"""Copy versions between a library and one behind a URL; a version keeps its name and number.

``tiny@3`` is the same version everywhere, or it is refused: what a lineage, an answer or an
adapter's base names stays true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.errors import Corrupt
from cluster.library import signatures
from cluster.library.disk import need, readable, staging, write_durably
from cluster.library.intake import inspect
from cluster.library.manifest import MANIFEST, Manifest
from cluster.library.ref import Ref
from cluster.library.references import ref_of
from cluster.library.remote import Remote
from cluster.library.store import Library, Version

DEEPEST = 8
"""Adapters that may stand on each other: a ring has no end."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class Copied:
    """One version that was to be copied."""

    ref: str
    new: bool
    """False when the other side had it already."""
    size: int
    """Bytes."""


def push(library: Library, version: Version, remote: Remote, report: Report) -> list[Copied]:
    """Store a version behind a URL, an adapter after its base; verified before, complete or not.

    Raises Corrupt when a file here differs, Conflict when the number is taken by another there.
    """
    done = []
    for one in _with_bases(library, version):
        report(f"pushing {one.ref} ({readable(one.manifest.size)}) to {remote.url}")
        library.verify(Ref(one.name, one.number))
        path = signatures.path_of(library.root, one.name, one.number)
        signature = path.read_bytes() if path.exists() else None
        new = remote.push(one.manifest, one.path, signature)
        done.append(Copied(one.ref, new, one.manifest.size))
    return done


def pull(library: Library, ref: Ref, remote: Remote, report: Report) -> list[Copied]:
    """Bring a version from behind a URL, an adapter's base before it.

    What comes is checked as an import is: the hashes, the file set, the headers, no code; and the
    signature where keys are trusted. Raises Corrupt, Conflict, UnknownModel; then nothing changed.
    """
    done = []
    for manifest, raw in reversed(_chain(remote, ref)):
        if (mine := library.holds(manifest)) is None:
            report(f"pulling {ref_of(manifest)} ({readable(manifest.size)}) from {remote.url}")
            _fetch(library, manifest, raw, remote)
        done.append(Copied(ref_of(manifest), mine is None, manifest.size))
    return done


def _chain(remote: Remote, ref: Ref) -> list[tuple[Manifest, bytes]]:
    """Return a version, and below an adapter what it stands on."""
    found = [remote.resolve(ref)]
    while (top := found[-1][0]).kind == "adapter" and top.base:
        if len(found) > DEEPEST:
            raise Corrupt(f"{remote.url}: {ref} stands on more than {DEEPEST} adapters")
        found.append(remote.resolve(Ref.parse(top.base)))
    return found


def _fetch(library: Library, manifest: Manifest, raw: bytes, remote: Remote) -> None:
    name, number = manifest.name, manifest.version
    with staging(library.root) as stage:
        need(library.root, manifest.size)
        place = stage / "files"
        place.mkdir()
        for file, entry in manifest.files.items():
            remote.fetch(manifest, file, entry, place / file)
        if set(taken := inspect(place).files) != set(manifest.files):
            odd = sorted(set(manifest.files) - set(taken))
            raise Corrupt(f"{remote.url}: {ref_of(manifest)} has files that may not enter: {odd}")
        write_durably(place / MANIFEST, raw)
        signature = remote.signature(manifest)
        if signature:
            path = signatures.path_of(stage, name, number)
            path.parent.mkdir(parents=True)
            path.write_bytes(signature)
        if not library.trusting and (folder := signatures.trusted()):
            found = Version(name, number, place, manifest)
            signatures.check(found, stage, signatures.keys_of(folder))
        library.adopt(manifest, place, signature)


def _with_bases(library: Library, version: Version) -> Iterator[Version]:
    if version.manifest.kind == "adapter" and version.manifest.base:
        yield from _with_bases(library, library.resolve(version.manifest.base))
    yield version
