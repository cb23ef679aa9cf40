"""Aliases of one model: names that move by compare-and-swap and never lose their history."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, StringConstraints, ValidationError

from cluster.config import Frozen
from cluster.errors import Conflict, Corrupt
from cluster.library.disk import explained, write_durably
from cluster.library.ref import ALIAS

ALIASES = "aliases.json"


class AliasMove(Frozen):
    """One line of the history."""

    alias: Annotated[str, StringConstraints(pattern=rf"^{ALIAS.pattern}$")]
    before: PositiveInt | None
    """``None`` for an alias that was new."""
    to: PositiveInt
    by: str
    """Who or what moved it."""
    at: str
    """UTC, ISO 8601."""


class Aliases(Frozen):
    """``aliases.json``: where each alias points now, and every move so far, oldest first."""

    schema_version: Literal[1] = 1
    aliases: dict[str, PositiveInt] = {}
    history: Annotated[tuple[AliasMove, ...], Field(default=())]


def read(directory: Path) -> Aliases:
    """Read a model's aliases; none yet is no error. Raises Corrupt when the file is damaged."""
    path = directory / ALIASES
    try:
        return Aliases.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Aliases(history=())
    except ValidationError as error:
        raise Corrupt(
            f"{path}: damaged ({error.error_count()} problems); put a backup there, or delete it "
            "to start without aliases"
        ) from None


def move(
    directory: Path, name: str, alias: str, to: int, expected: int | None, by: str
) -> AliasMove:
    """Point ``alias`` at version ``to`` if it points at ``expected`` now; hold the name's lock.

    Raises Conflict, naming where it points, when somebody else was first.
    """
    state = read(directory)
    now = state.aliases.get(alias)
    if now != expected:
        raise Conflict(
            f"{name}@{alias} points to {_told(now)}, not to {_told(expected)} as expected; look "
            f"again (`roundhouse models show {name}`) and repeat"
        )
    step = AliasMove(
        alias=alias, before=now, to=to, by=by, at=datetime.now(UTC).isoformat(timespec="seconds")
    )
    after = Aliases(aliases={**state.aliases, alias: to}, history=(*state.history, step))
    with explained(f"move {name}@{alias}", directory, 0):
        write_durably(directory / ALIASES, after.model_dump_json(indent=2).encode() + b"\n")
    return step


def _told(version: int | None) -> str:
    return "nothing" if version is None else f"version {version}"
