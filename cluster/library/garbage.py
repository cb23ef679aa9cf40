"""Clear what nobody can use: leftovers of killed processes and, when asked, old versions.

A killed writer leaves a staging directory, a file that was to replace another, the files of a
version that no longer has a manifest, or figures without their record. None of them is ever read.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import LibraryError, UnknownModel
from cluster.library import layout
from cluster.library.disk import dead_stages, explained, locked
from cluster.library.manifest import MANIFEST
from cluster.library.ref import Ref
from cluster.library.references import named
from cluster.library.store import Library, Version

_TORN = re.compile(r"\..+\.[0-9a-f]{8}")
"""The name of a file that was being written to replace another."""


@dataclass(frozen=True)
class Garbage:
    """One thing that was, or would be, removed."""

    what: str
    where: str
    """Below the library's root, or a version's reference."""
    size: int
    """Bytes."""


def collect(library: Library, dry_run: bool = False) -> list[Garbage]:
    """Remove what dead processes left, and say what; with ``dry_run`` only say it.

    Raises LibraryError when the disk refuses; what went before is gone, the rest as it was.
    """
    with explained("gc", library.root, 0):
        return [*_stages(library.root, dry_run), *_models(library, dry_run)]


def unneeded(library: Library, keep: int) -> list[Version]:
    """Return the versions that nobody needs but for their age, in an order to remove them in.

    Needed is what an alias points to or pointed to just before (so that it can go back), the
    newest ``keep`` of each model, and all that these were made with.
    """
    versions = {v.ref: v for name in library.names() for v in library.versions(name)}
    wanted = {ref for name in library.names() for ref in _wanted(library, name, keep)}
    pending = list(wanted)
    while pending:
        version = versions.get(pending.pop())
        new = set(named(version.manifest).values()) - wanted if version else set()
        wanted |= new
        pending += new
    left = {ref: version for ref, version in versions.items() if ref not in wanted}
    order: list[Version] = []
    while left:
        needed = {other for v in left.values() for other in named(v.manifest).values()}
        # of versions that name each other in a ring, none can go
        free = [version for ref, version in left.items() if ref not in needed or _alone(version)]
        if not free:
            break
        order += free
        left = {ref: version for ref, version in left.items() if version not in free}
    return order


def retire(library: Library, versions: list[Version]) -> tuple[list[Garbage], list[str]]:
    """Remove versions; return what went, and why others stayed (somebody began to need them)."""
    gone, stayed = [], []
    for version in versions:
        try:
            library.remove(version.ref)
        except UnknownModel:
            continue  # somebody else has removed it
        except LibraryError as error:
            stayed.append(str(error))
        else:
            gone.append(garbage_of(version))
    return gone, stayed


def garbage_of(version: Version) -> Garbage:
    """Return a version as something to remove."""
    return Garbage("old version", version.ref, version.manifest.size)


def _wanted(library: Library, name: str, keep: int) -> Iterator[str]:
    newest = [version.number for version in library.versions(name)][-keep:] if keep else []
    pointed = library.aliases(name)
    last = {move.alias: move.before for move in library.alias_history(name)}
    for number in {*newest, *pointed.values(), *last.values()} - {None}:
        yield str(Ref(name, version=number))


def _alone(version: Version) -> bool:
    return version.ref in named(version.manifest).values()


def _stages(root: Path, dry_run: bool) -> Iterator[Garbage]:
    with dead_stages(root) as places:
        for place in places:
            size = _size(place)
            if not dry_run:
                shutil.rmtree(place)
            yield Garbage("unfinished publish", str(place.relative_to(root)), size)


def _models(library: Library, dry_run: bool) -> Iterator[Garbage]:
    for name in layout.names(library.root):
        home = layout.home(library.root, name)
        if not home.is_dir():
            continue
        with _held(home / ".lock", dry_run):  # no removal and no other gc meanwhile
            yield from _drop(library, _in_home(library, name), dry_run)
            for place in sorted((home / "evaluations").glob("[0-9]*")):
                with _held(place / ".lock", dry_run):  # nor an evaluation of this version
                    yield from _drop(library, _in_evaluations(home, place), dry_run)


def _in_home(library: Library, name: str) -> Iterator[tuple[str, Path]]:
    home = layout.home(library.root, name)
    yield from (("unfinished write", path) for path in _torn(home))
    for number in layout.numbers(library.root, name):
        place = layout.directory(library.root, name, number)
        if not (place / MANIFEST).exists():
            for path in _entries(place):
                if path.name != layout.REMOVED:
                    yield f"file of {name}@{number}, which is no version", path

    yield from _in_signatures(home)


def _in_signatures(home: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted((home / "signatures").glob("[0-9]*.sig")):
        if not (home / "versions" / path.stem / MANIFEST).exists():
            yield f"signature of {home.name}@{path.stem}, which is no version", path
    if (home / "signatures").is_dir():
        yield from (("unfinished write", path) for path in _torn(home / "signatures"))


def _in_evaluations(home: Path, place: Path) -> Iterator[tuple[str, Path]]:
    if not (home / "versions" / place.name / MANIFEST).exists():
        yield f"evaluations of {home.name}@{place.name}, which is no version", place
        return
    yield from (("unfinished write", path) for path in _torn(place))
    for path in sorted(place.glob("*.jsonl")):
        if not path.with_suffix(".json").exists():
            yield "outcomes without their figures", path


def _torn(place: Path) -> list[Path]:
    return [path for path in _entries(place) if _TORN.fullmatch(path.name)]


def _entries(place: Path) -> list[Path]:
    try:
        return sorted(place.iterdir())
    except FileNotFoundError:  # a rehearsal holds no lock
        return []


def _drop(library: Library, found: Iterator[tuple[str, Path]], dry_run: bool) -> Iterator[Garbage]:
    for what, path in list(found):
        size = _size(path)
        if dry_run or _gone(path):
            yield Garbage(what, str(path.relative_to(library.root)), size)


def _gone(path: Path) -> bool:
    """Remove a file or a directory; False when somebody has begun to write into it again."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return True
    try:
        shutil.rmtree(path)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False  # the next gc sees it as it is then
    return True


def _held(lock: Path, dry_run: bool) -> AbstractContextManager[None]:
    return nullcontext() if dry_run else locked(lock, "gc")


def _size(path: Path) -> int:
    size = 0
    for one in [path] if not path.is_dir() else path.rglob("*"):
        with suppress(FileNotFoundError):  # a rehearsal holds no lock
            size += one.lstat().st_size if not one.is_dir() else 0
    return size
