"""Which models leave a node's memory, and which come back. Decisions about values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from serve_apps.release_policy import Report


@dataclass(frozen=True, slots=True)
class Tenant:
    """One model, as it is now."""

    name: str
    asleep: bool
    """Whether all its replicas say that their memory is free."""
    ordered: bool
    """Whether it has been told to sleep."""
    idle_s: float
    """Since its last request ended; 0 while one runs."""
    limit_s: float | None = None
    """Idle for so long, it sleeps by itself."""
    needs: Mapping[str, int] = field(default_factory=dict)
    """Bytes that it takes on each node while it is awake."""
    wanted: bool = False
    """Whether a request waits for it, or something else needs it awake."""
    unload: bool = False
    """Whether somebody has asked that it leave."""
    starting: bool = False
    """Whether none of its replicas has answered yet."""

    @property
    def may_go(self) -> bool:
        """Whether it can be put to sleep for another one."""
        return not (self.asleep or self.ordered or self.wanted) and self.idle_s > 0


@dataclass(frozen=True, slots=True)
class Sleep:
    """Who shall sleep, and why somebody who is wanted does not wake yet."""

    asleep: frozenset[str]
    waits: Mapping[str, str] = field(default_factory=dict)


def decide(models: Sequence[Tenant], budget: int | None = None) -> Sleep:
    """Return what should be; ``budget``: bytes that models may take on each node.

    What is busy never sleeps. What is wanted wakes once there is room, which the longest unused of
    the others make; where they cannot, nobody is put to sleep for nothing.
    """
    # one that was told to sleep and has a request after all goes on
    asleep = {m.name for m in models if m.ordered and (m.asleep or m.starting or m.idle_s > 0)}
    for model in models:
        too_long = model.limit_s is not None and model.idle_s >= model.limit_s
        if not model.wanted and model.idle_s > 0 and (model.unload or too_long):
            asleep.add(model.name)
    if budget is None:
        return Sleep(frozenset(asleep - {m.name for m in models if m.wanted}))
    _shrink(models, budget, asleep)
    waits: dict[str, str] = {}
    for model in models:
        if model.wanted and model.name in asleep:
            _wake(model, models, budget, asleep, waits)
    return Sleep(frozenset(asleep), waits)


def _shrink(models: Sequence[Tenant], budget: int, asleep: set[str]) -> None:
    """Put the longest unused to sleep until what stays awake is within the budget."""
    for node in {node for model in models for node in model.needs}:
        staying = [m for m in models if m.name not in asleep and node in m.needs]
        over = sum(m.needs[node] for m in staying) - budget
        for model in sorted(staying, key=lambda m: -m.idle_s):
            if over > 0 and model.may_go:
                asleep.add(model.name)
                over -= model.needs[node]
        for model in staying:
            if over > 0 and model.starting and not model.wanted:  # it begins asleep
                asleep.add(model.name)
                over -= model.needs[node]


def _wake(
    model: Tenant,
    models: Sequence[Tenant],
    budget: int,
    asleep: set[str],
    waits: dict[str, str],
) -> None:
    victims: set[str] = set()
    for node, need in model.needs.items():
        staying = [
            m
            for m in models
            if m.name not in asleep | victims and m is not model and node in m.needs
        ]
        free = budget - sum(m.needs[node] for m in staying)
        for other in sorted(staying, key=lambda m: -m.idle_s):
            if free < need and other.may_go:
                victims.add(other.name)
                free += other.needs[node]
        if free < need:
            held = ", ".join(f"{m.name} {_gb(m.needs[node])}" for m in staying) or "nothing"
            waits[model.name] = (
                f"{model.name} needs {_gb(need)} and models may take {_gb(budget)} of a node's "
                f"memory (limits.models_memory_gb); in use: {held}"
            )
            return
    asleep |= victims
    # those that sleep soon still have their memory
    going = [
        m.name
        for m in models
        if m.name in asleep and not m.asleep and m is not model and set(m.needs) & set(model.needs)
    ]
    if going:
        waits[model.name] = f"{model.name} waits until {', '.join(sorted(going))} has left"
    else:
        asleep.discard(model.name)


def most_on_a_node(reports: Iterable[Report]) -> int | None:
    """Return what replicas take of the node where they take most; ``None``: nobody knows."""
    taken: dict[str, int] = {}
    for report in reports:
        if report.need_bytes is not None:
            taken[report.node] = taken.get(report.node, 0) + report.need_bytes
    return max(taken.values(), default=None)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
