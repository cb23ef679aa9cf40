"""What became of each attempt to put a version in another's place: one file a release.

    <root>/models/<name>/releases/<number>.json

A record only grows: each entry says what happened and why, and is on the disk before anything
acts on it. So whoever conducts a release may be killed between any two entries, and its successor
knows from the last one what holds.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, ValidationError

from cluster.config import Frozen
from cluster.errors import Conflict, Corrupt
from cluster.library import layout
from cluster.library.disk import explained, locked, write_durably

RELEASES = "releases"
Happening = Literal[
    "started", "advanced", "held", "approved", "promoting", "promoted", "rolled_back"
]
OVER = frozenset({"promoted", "rolled_back"})


class Entry(Frozen):
    """One thing that happened."""

    what: Happening
    why: str
    at: str
    """UTC, ISO 8601."""
    step: int | None = None
    """Of the policy's traffic steps, from 0; ``None`` before the first."""
    percent: float = 0.0
    """Of the requests that may go to the candidate, how many do from now on."""
    seen: dict[str, Any] = {}
    """The figures that decided."""


class Release(Frozen):
    """One release with all that happened to it, oldest first."""

    schema_version: Literal[1] = 1
    number: PositiveInt
    name: str
    alias: str
    """The alias that is to move."""
    champion: PositiveInt
    """Where the alias points while it runs."""
    candidate: PositiveInt
    policy: dict[str, Any]
    """What had to hold, as it was resolved."""
    by: str
    entries: tuple[Entry, ...]

    @property
    def ref(self) -> str:
        """The candidate's reference."""
        return f"{self.name}@{self.candidate}"

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more."""
        return self.entries[-1].what in OVER

    @property
    def moved(self) -> Entry:
        """The last entry that changed what goes where: what holds now."""
        return next(e for e in reversed(self.entries) if e.what not in ("held", "approved"))

    @property
    def approved(self) -> bool:
        """Whether somebody has let it pass where the figures were not clear enough."""
        return any(entry.what == "approved" for entry in self.entries)


def entry(what: Happening, why: str, **more: Any) -> Entry:
    """Return an entry of now."""
    return Entry(what=what, why=why, at=datetime.now(UTC).isoformat(timespec="seconds"), **more)


def begin(
    root: Path,
    name: str,
    alias: str,
    champion: int,
    candidate: int,
    policy: dict[str, Any],
    by: str,
    why: str,
) -> Release:
    """Write the first entry of a new release and return it.

    Raises Conflict while another release of the model runs.
    """
    place = _folder(root, name)
    with explained(f"release of {name}@{candidate}", place, 0):
        place.mkdir(parents=True, exist_ok=True)
        with locked(layout.home(root, name) / ".lock", f"release of {name}@{candidate}"):
            before = of(root, name)
            if before and not before[-1].over:
                raise Conflict(
                    f"a release of {before[-1].ref} runs (`roundhouse release status {name}`); "
                    f"end it with `roundhouse release stop {name}`"
                )
            number = before[-1].number + 1 if before else 1
            made = Release(
                number=number,
                name=name,
                alias=alias,
                champion=champion,
                candidate=candidate,
                policy=policy,
                by=by,
                entries=(entry("started", why),),
            )
            _write(root, made)
    return made


def append(root: Path, release: Release, more: Entry) -> Release:
    """Add an entry to a release that is not over, and return it as it is now."""
    assert not release.over, f"release {release.number} of {release.name} is over"
    grown = release.model_copy(update={"entries": (*release.entries, more)})
    with explained(f"release of {release.ref}", _folder(root, release.name), 0):
        _write(root, grown)
    return grown


def of(root: Path, name: str) -> list[Release]:
    """Return the releases of a model, oldest first; Corrupt when one cannot be read."""
    place = _folder(root, name)
    numbers = sorted(int(f[:-5]) for f in layout.children(place) if f[:-5].isdecimal())
    return [_read(place / f"{number}.json") for number in numbers]


def running(root: Path, name: str) -> Release | None:
    """Return the release of a model that is not over, if there is one."""
    found = of(root, name)[-1:]
    return found[0] if found and not found[0].over else None


def _read(path: Path) -> Release:
    try:
        return Release.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise Corrupt(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); put a backup there, or delete "
            "it: the alias alone says what answers"
        ) from None


def _write(root: Path, release: Release) -> None:
    path = _folder(root, release.name) / f"{release.number}.json"
    write_durably(path, release.model_dump_json(indent=2).encode() + b"\n")


def _folder(root: Path, name: str) -> Path:
    return layout.home(root, name) / RELEASES
