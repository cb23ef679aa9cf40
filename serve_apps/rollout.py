"""Which replicas may load a version now, and which answer with it already. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from serve_apps.release_config import Pace
from serve_apps.release_policy import Decision, GiveUp, Go, Report, Wait


def granted(
    pace: Pace,
    target: str,
    replicas: Mapping[str, Report],
    allowed: Collection[str],
    need_bytes: int,
    done: Collection[str] | None = None,
) -> set[str]:
    """Return the replicas that may hold ``target``; who may once, may on.

    ``need_bytes`` is what it takes in memory; ``done`` those whose turn is over, by default those
    that hold it.
    """
    if pace == "all":
        return set(replicas)
    if done is None:
        done = {who for who, report in replicas.items() if target in report.held}
    may = {who for who in replicas if who in allowed or target in replicas[who].held}
    busy, waiting = may - set(done), sorted(set(replicas) - may)
    if not waiting:
        return may
    if pace == "one":
        return may if busy else may | {waiting[0]}
    free = _free(replicas)
    for who in busy:
        free[replicas[who].node] -= 0 if target in replicas[who].held else need_bytes
    for who in waiting:
        if free[replicas[who].node] >= need_bytes:
            free[replicas[who].node] -= need_bytes
            may.add(who)
    # where none fits one tries, so that its refusal says by how much
    return may if may else {waiting[0]}


def bytes_of(parameters: int | None) -> int:
    """Return what so many weights take in memory at most: four bytes each."""
    return 4 * (parameters or 0)


def turns(
    target: str, replicas: Mapping[str, Report], known: Collection[str], flipped: Collection[str]
) -> Decision:
    """Decide whether replicas that load and flip in turns have all done so."""
    for who, report in sorted(replicas.items()):
        if target in report.failed:
            return GiveUp(f"replica {who} could not load {target}: {report.failed[target]}")
        if who in flipped and report.active is None:
            return GiveUp(f"replica {who} stopped answering with {target}")
    if gone := sorted(set(known) - set(replicas)):
        return GiveUp(f"replica {gone[0]} died while {target} was put live")
    there = sum(report.active == target for report in replicas.values())
    if not replicas or there < len(replicas):
        return Wait(f"{there} of {len(replicas)} replicas answer with {target}")
    return Go()


def _free(replicas: Mapping[str, Report]) -> dict[str, float]:
    """Return the free memory of each node in bytes, by the least that was reported of it."""
    free: dict[str, float] = {}
    for report in replicas.values():
        said = float("inf") if report.free_bytes is None else float(report.free_bytes)
        free[report.node] = min(free.get(report.node, float("inf")), said)
    return free
