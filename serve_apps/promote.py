"""``roundhouse promote`` and ``rollback``: move an alias, live where the model is deployed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from cluster.errors import ClusterError, ReleaseError, RoundhouseError
from cluster.library.ref import CHAMPION, Ref, Update
from cluster.library.store import Library
from cluster.session import connect, current

POLL_S = 0.5
GRACE_S = 15.0
"""Beyond the promotion's own bound, for an answer that is on its way."""

PACES = ("all", "one", "surge")
UPDATES = get_args(Update)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Move:
    """An alias move that somebody asked for."""

    name: str
    alias: str | None
    """``None``: the alias that the model is deployed with, else champion."""
    before: int | None
    """Where the alias points; checked again at the moment of the swap."""
    to: int


def wanted(reference: str, alias: str | None, library: Library) -> Move:
    """Return what ``promote`` was asked for: a bare name means the newest version."""
    ref = Ref.parse(reference)
    if ref.version is None and ref.alias is None and ref.live is None:
        newest = library.versions(ref.name)[-1:]
        version = newest[0] if newest else library.resolve(ref)
    else:
        version = library.resolve(ref)
    before = library.aliases(ref.name).get(alias or CHAMPION)
    return Move(ref.name, alias, before, version.number)


def previous(name: str, alias: str | None, library: Library) -> Move:
    """Return the move back to where the alias pointed before. ReleaseError when it never moved."""
    library.resolve(Ref.parse(name).name)  # an unknown name is told as such
    chosen = alias or CHAMPION
    moves = [move for move in library.alias_history(name) if move.alias == chosen]
    if not moves or moves[-1].before is None:
        raise ReleaseError(
            f"{name}@{chosen} has pointed nowhere else; `roundhouse promote {name}@N` names a "
            "version"
        )
    return Move(name, alias, moves[-1].to, moves[-1].before)


def carry_out(
    move: Move,
    expected: int | None,
    timeout_s: float,
    by: str,
    library: Library,
    say: Say,
    pace: str = "all",
    update: str | None = None,
) -> bool:
    """Do it; return whether a running model answers with it now.

    Without a cluster, or where the model is not deployed, only the library changes.
    """
    try:
        cluster = current()
    except ClusterError:
        return _only_the_alias(move, by, library, say, "no cluster runs")
    connect(cluster)
    from serve_apps.releases_actor import find_releases

    actor = find_releases()
    if actor is None:
        return _only_the_alias(move, by, library, say, "nothing is deployed")
    import ray

    if move.name not in ray.get(actor.names.remote(), timeout=GRACE_S):
        return _only_the_alias(move, by, library, say, "it is not deployed")
    asked = actor.promote.remote(
        move.name, move.to, move.alias, expected, timeout_s, by, pace, update
    )
    until, told = time.monotonic() + timeout_s + GRACE_S, ""
    while True:
        try:
            done, _ = ray.wait([asked], timeout=POLL_S)
            if done:
                ray.get(asked)
                return True
            line = ray.get(actor.progress.remote(move.name), timeout=GRACE_S)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (
                cause if isinstance(cause, RoundhouseError) else ReleaseError(str(cause))
            ) from None
        except ray.exceptions.RayError as error:
            raise ReleaseError(
                f"the Releases actor went away ({type(error).__name__}); see where the alias "
                f"points with `roundhouse models show {move.name}`, then repeat"
            ) from None
        if line and line != told:
            say(line)
            told = line
        if time.monotonic() > until:
            raise ReleaseError(f"no answer from the Releases actor after {timeout_s:g} s")


def _only_the_alias(move: Move, by: str, library: Library, say: Say, why: str) -> bool:
    alias = move.alias or CHAMPION
    now = library.aliases(move.name).get(alias)
    if now != move.to:
        library.move_alias(move.name, alias, move.to, now, by)
    say(f"{why}: the alias moved in the library, and counts from the next deploy")
    return False
