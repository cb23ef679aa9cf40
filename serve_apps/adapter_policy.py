"""Which adapters a gateway may be asked for, from what replicas report. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from cluster.library.ref import CHAMPION, NEWEST, Ref
from serve_apps.release_policy import (
    Decision,
    GiveUp,
    Go,
    Report,
    Served,
    Wait,
)

Alias = Callable[[str], tuple[str, str] | None]
"""What the library says of an adapter's name: the version that answers, and its base."""


def adapters_of(model: str, reports: Iterable[Report], alias: Alias) -> list[Served]:
    """Return the adapters of a deployed model, by name.

    The library's word counts as soon as it is given, if the base of what it names is held: the
    replica that is asked reads the adapter then. Else the version that replicas answer with stays.
    Of those that follow the shelf each replica answers with what it holds.
    """
    bases, held, follows = dict[str, str](), set[str](), set[str]()
    failed = dict[str, str]()
    active = dict[str, tuple[str, ...]]()
    for report in reports:
        bases |= report.adapters
        failed |= report.failed
        held |= {*report.held}
        follows |= {*report.follows}
        for ref in report.adapters_active:
            name = _name(ref)
            active[name] = (*active.get(name, ()), ref) if name in follows else (ref,)
    for name in sorted({_name(ref) for ref in bases} - follows):
        said = alias(name)
        if said and (said[0] in bases or said[1] in held):
            active[name] = (said[0],)
            bases.setdefault(*said)
    made = []
    for name, refs in sorted(active.items()):
        own = {one: base for one, base in bases.items() if _name(one) == name}
        made.append(
            Served(
                name,
                NEWEST if name in follows else CHAMPION,
                tuple(sorted({*refs}, key=_place)),
                tuple(sorted(own, key=_place)),
                app=model,
                bases=own,
                failed={ref: why for ref, why in failed.items() if _name(ref) == name},
            )
        )
    return made


def after_reading(target: str, replicas: Mapping[str, Report]) -> Decision:
    """Decide whether all live replicas can answer with an adapter's version."""
    for who, report in sorted(replicas.items()):
        if target in report.failed:
            return GiveUp(f"replica {who}: {report.failed[target]}")
    there = sum(target in report.adapters for report in replicas.values())
    if replicas and there == len(replicas):
        return Go()
    return Wait(f"reading {target}: {there} of {len(replicas)} replicas")


def reports_of(name: str, reports: Mapping[str, Report]) -> dict[str, Report]:
    """Return what a model's replicas report, as of one of its adapters alone.

    It is held where it is in the engine: what merely fits may still turn out not to load.
    """
    return {
        who: replace(
            report,
            active=next((ref for ref in report.adapters_active if _name(ref) == name), None),
            held=tuple(ref for ref in report.adapters_read if _name(ref) == name),
        )
        for who, report in reports.items()
    }


def names_of(report: Report) -> set[str]:
    """Return the adapters that a replica knows."""
    return {_name(ref) for ref in report.adapters}


def _name(ref: str) -> str:
    return ref.partition("@")[0]


def _place(ref: str) -> tuple[int, str, int]:
    """Return what sorts versions: the library's by number, then each run's by step."""
    parsed = Ref.parse(ref)
    if parsed.live is None:
        return parsed.version or 0, "", 0
    run, _, step = parsed.live.rpartition(".")
    return 2**31, run, int(step)
