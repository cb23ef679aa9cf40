"""Where a version comes from, back to its data; and where a data set went, forward.

Both walks read manifests alone. Those of removed versions are kept, so a chain does not break
where a link is gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from cluster.errors import ConfigError, Corrupt, UnknownModel
from cluster.library import evaluations, layout
from cluster.library.aliases import AliasMove
from cluster.library.evaluations import Evaluation
from cluster.library.manifest import Manifest
from cluster.library.ref import NAME, Ref
from cluster.library.references import named, ref_of
from cluster.library.store import Library

_HASH = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Ancestor:
    """One version of a chain, and what it was made with."""

    ref: str
    there: bool
    """False when it was removed, or never was in this library."""
    manifest: Manifest | None = None
    """``None`` when nothing is known of it here."""
    evaluations: tuple[Evaluation, ...] = ()
    moves: tuple[AliasMove, ...] = ()
    """Every time that an alias was pointed at it: who promoted it."""
    made_with: dict[str, Ancestor] = field(default_factory=dict)
    """By role: its base, its teacher."""


@dataclass(frozen=True)
class Touch:
    """One way in which a data set reached a version."""

    ref: str
    there: bool
    how: str
    """``trained on``, ``evaluated on``, or ``made with``."""
    what: str
    """The name that the data had there, or the version and its role that brought it."""


def walk(library: Library, ref: str | Ref) -> Ancestor:
    """Return a version and all that it was made with, back to what was imported.

    ``ref`` may be the ``system_fingerprint`` of an answer. One of a running job,
    ``name@run.<id>.<step>``, means the newest version of that run. Raises UnknownModel.
    """
    ref = Ref.parse(ref) if isinstance(ref, str) else ref
    version = _of_run(library, ref) if ref.live else library.resolve(ref).ref
    return _ancestor(library, version, frozenset())


def touched(library: Library, data: str) -> list[Touch]:
    """Return every version that a data set reached, by the first hex digits of its SHA-256.

    Trained on it, evaluated on it, or made with a version that was trained on it: such a version
    is listed once for each. Raises ConfigError for what is no hash of at least eight digits, and
    when it is the beginning of several.
    """
    data = data.removeprefix("sha256:").lower()
    if not _HASH.fullmatch(data):
        raise ConfigError(
            f"--data {data!r:.80}: 8 to 64 hex digits of a file's SHA-256, as `roundhouse models "
            "show` and `sha256sum FILE` print it"
        )
    manifests = list(_known(library))
    hits = [
        (Touch(ref_of(manifest), there, how, name), sha256)
        for manifest, there in manifests
        for how, name, sha256 in _data(library, manifest)
        if sha256.startswith(data)
    ]
    if len(hashes := {sha256 for _, sha256 in hits}) > 1:
        few = ", ".join(digest[:16] for digest in sorted(hashes)[:4])
        raise ConfigError(f"--data {data}: {len(hashes)} data sets begin so ({few}); give more")
    found = [hit for hit, _ in hits]
    reached = {hit.ref for hit in found if hit.how == "trained on"}
    while new := [hit for hit in _made_with(manifests, reached) if hit not in found]:
        found += new
        reached |= {hit.ref for hit in new}
    return found


def _ancestor(library: Library, ref: str, below: frozenset[str]) -> Ancestor:
    name, _, digits = ref.partition("@")
    if ref in below or not NAME.fullmatch(name) or not digits.isdecimal():
        return Ancestor(ref, there=False)  # a ring or a name that somebody wrote by hand
    number = int(digits)
    there, manifest = True, None
    try:
        manifest = library.get(name, number).manifest
    except UnknownModel:
        there, manifest = False, library.removed(name, number)
    except Corrupt:
        pass  # it is there, and what it says of itself cannot be believed
    others = named(manifest) if manifest else {}
    return Ancestor(
        ref=ref,
        there=there,
        manifest=manifest,
        evaluations=tuple(evaluations.of(library.root, name, number)),
        moves=tuple(move for move in library.alias_history(name) if move.to == number),
        made_with={role: _ancestor(library, one, below | {ref}) for role, one in others.items()},
    )


def _of_run(library: Library, ref: Ref) -> str:
    assert ref.live is not None
    run = ref.live.split(".")[1]
    made = [
        version
        for version in library.versions(ref.name)
        if version.manifest.lineage and version.manifest.lineage.run_id == run
    ]
    if not made:
        raise UnknownModel(
            f"{ref}: a version of the run {run}, which has published none of {ref.name} yet; see "
            f"`roundhouse jobs logs {run}`"
        )
    return made[-1].ref


def _known(library: Library) -> Iterator[tuple[Manifest, bool]]:
    """Yield every manifest, and whether its version is still there."""
    for name in layout.names(library.root):
        there = {version.number: version.manifest for version in library.versions(name)}
        for number in layout.numbers(library.root, name):
            if manifest := there.get(number) or library.removed(name, number):
                yield manifest, number in there


def _data(library: Library, manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    lineage = manifest.lineage
    for name, sha256 in (lineage.data_hashes if lineage else {}).items():
        yield "trained on", name, sha256
    for found in evaluations.of(library.root, manifest.name, manifest.version):
        for name, sha256 in found.data.items():
            yield "evaluated on", name, sha256


def _made_with(manifests: list[tuple[Manifest, bool]], reached: set[str]) -> Iterator[Touch]:
    for manifest, there in manifests:
        for role, other in named(manifest).items():
            if other in reached:
                yield Touch(ref_of(manifest), there, "made with", f"{other} ({role})")
