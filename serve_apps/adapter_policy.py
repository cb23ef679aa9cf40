"""Which adapters a gateway may be asked for, from what replicas report. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from serve_apps.release_policy import Decision, GiveUp, Go, Report, Served, Wait

Alias = Callable[[str], tuple[str, str] | None]
"""What the library says of an adapter's name: the version that answers, and its base."""


def adapters_of(model: str, reports: Iterable[Report], alias: Alias) -> list[Served]:
    """Return the adapters of a deployed model, by name.

    The library's word counts as soon as it is given, if the base of what it names is held: the
    replica that is asked reads the adapter then. Else the version that replicas answer with stays.
    """
    bases, active, held = dict[str, str](), dict[str, str](), set[str]()
    for report in reports:
        bases |= report.adapters
        active |= {_name(ref): ref for ref in report.adapters_active}
        held |= {*report.held}
    for name in sorted({_name(ref) for ref in bases}):
        said = alias(name)
        if said and (said[0] in bases or said[1] in held):
            active[name] = said[0]
            bases.setdefault(*said)
    made = []
    for name, ref in sorted(active.items()):
        own = {one: base for one, base in bases.items() if _name(one) == name}
        live = tuple(sorted(own, key=lambda one: int(one.rpartition("@")[2])))
        made.append(Served(name, "champion", (ref,), live, app=model, bases=own))
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


def _name(ref: str) -> str:
    return ref.partition("@")[0]
