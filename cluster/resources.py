"""Does it fit? What a job or an app needs against what nodes have free; pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.errors import NotEnough

GIB = 1 << 30
EPSILON = 1e-6  # Ray counts in ten-thousandths of a CPU


@dataclass(frozen=True, slots=True)
class Demand:
    """``count`` equal bundles; each must lie on one node, and they may lie on several."""

    what: str
    """Who asks, as the user knows it: ``train rank``, ``model smollm2-135m-instruct``."""
    cpus: float
    """Logical CPUs of one bundle."""
    gpus: float = 0.0
    memory_bytes: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.count} x {self.what} ({_amounts(self.cpus, self.gpus, self.memory_bytes)})"


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster: what it has, and what is free now."""

    name: str
    cpus: float
    cpus_free: float
    gpus: float = 0.0
    gpus_free: float = 0.0
    memory_bytes: int = 0
    memory_free_bytes: int = 0

    def fits(self, demand: Demand) -> bool:
        """Say whether one bundle of ``demand`` fits into what is free."""
        return (
            demand.cpus <= self.cpus_free + EPSILON
            and demand.gpus <= self.gpus_free + EPSILON
            and demand.memory_bytes <= self.memory_free_bytes
        )

    def less(self, demand: Demand) -> Node:
        """Return the node with one bundle of ``demand`` on it."""
        return replace(
            self,
            cpus_free=self.cpus_free - demand.cpus,
            gpus_free=self.gpus_free - demand.gpus,
            memory_free_bytes=self.memory_free_bytes - demand.memory_bytes,
        )

    def idle(self) -> Node:
        """Return the node as it would be with nothing on it."""
        return replace(
            self,
            cpus_free=self.cpus,
            gpus_free=self.gpus,
            memory_free_bytes=self.memory_bytes,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each bundle would go, or why it cannot."""

    placed: tuple[tuple[str, str], ...]
    """(what, node) in the order of placing."""
    lacking: str | None = None
    """What is wanted, what is free, and a way out; ``None`` when everything fits."""

    @property
    def fits(self) -> bool:
        """Say whether every bundle found a node."""
        return self.lacking is None

    def require(self) -> Plan:
        """Return the plan; NotEnough with the reason when it does not fit."""
        if self.lacking:
            raise NotEnough(self.lacking)
        return self

    def __str__(self) -> str:
        if self.lacking:
            return f"does not fit: {self.lacking}"
        counts: dict[tuple[str, str], int] = {}
        for pair in self.placed:
            counts[pair] = counts.get(pair, 0) + 1
        told = ", ".join(f"{n} x {what} on {node}" for (what, node), n in counts.items())
        return f"fits: {told}" if told else "fits: nothing is wanted"


def plan(demands: Sequence[Demand], nodes: Sequence[Node]) -> Plan:
    """Place every bundle, large ones first, each on the fullest node that still takes it.

    That is what Ray's packing does, near enough to tell a user before anything starts; Ray has
    the last word.
    """
    order = sorted(demands, key=lambda d: (d.gpus, d.cpus, d.memory_bytes), reverse=True)
    placed, missing = _place(order, nodes)
    if missing is None:
        return Plan(placed)
    _, impossible = _place(order, [node.idle() for node in nodes])
    free = "; ".join(
        f"{n.name} has {_amounts(n.cpus_free, n.gpus_free, n.memory_free_bytes)} free of "
        f"{_amounts(n.cpus, n.gpus, n.memory_bytes)}"
        for n in nodes
    )
    wanted = ", ".join(str(demand) for demand in order)
    way_out = (
        "ask for less (fewer ranks or replicas, a smaller num_cpus or num_gpus), or use a "
        "larger machine"
        if impossible
        else "end what holds the rest (`roundhouse status` shows jobs and applications), or ask "
        "for less"
    )
    return Plan(placed, f"wanted: {wanted}; {free or 'there is no node'}; {way_out}")


def _place(
    order: Sequence[Demand], nodes: Sequence[Node]
) -> tuple[tuple[tuple[str, str], ...], Demand | None]:
    free = {node.name: node for node in nodes}
    assert len(free) == len(nodes), "node names are unique"
    placed: list[tuple[str, str]] = []
    for demand in order:
        for _ in range(demand.count):
            taking = [node for node in free.values() if node.fits(demand)]
            if not taking:
                return tuple(placed), demand
            tightest = min(taking, key=lambda n: (n.gpus_free, n.cpus_free, n.memory_free_bytes))
            free[tightest.name] = tightest.less(demand)
            placed.append((demand.what, tightest.name))
    return tuple(placed), None


def _amounts(cpus: float, gpus: float, memory_bytes: int) -> str:
    parts = [f"{cpus:g} CPU"]
    if gpus:
        parts.append(f"{gpus:g} GPU")
    if memory_bytes:
        parts.append(f"{memory_bytes / GIB:.1f} GiB")
    return " + ".join(parts)
