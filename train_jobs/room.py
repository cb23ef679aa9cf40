"""Whether a run fits onto what a cluster has: ranks, and the memory of each. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.resources import GIB, Node, Plan, plan
from train_jobs.config import FinetuneConfig
from train_jobs.plan import demand

if TYPE_CHECKING:
    from cluster.session import Cluster

MIB = 1 << 20


@dataclass(frozen=True)
class Room:
    """What a cluster has for a run."""

    nodes: tuple[Node, ...]
    gpu_bytes: int | None = None
    """Memory of one GPU, the smallest there is; None where no node tells."""

    @classmethod
    def of(cls, cluster: Cluster) -> Room:
        """Ask the head: living nodes, and those that could still be started."""
        from cluster.status import room

        summary = cluster.json("GET", "/nodes?view=summary")["data"]["summary"]
        return cls(tuple(room(cluster)), smallest_gpu(summary))

    def idle(self) -> Room:
        """Return it as it would be with nothing on it."""
        return replace(self, nodes=tuple(node.idle() for node in self.nodes))

    def compares(self, config: FinetuneConfig) -> bool:
        """Say whether it is known how much memory a rank of a run finds."""
        if config.run.num_gpus:
            return self.gpu_bytes is not None
        return all(node.memory_bytes for node in self.nodes)

    def plan(self, config: FinetuneConfig, need: int) -> Plan:
        """Place the ranks of a run, the fewest it works with, each with ``need`` bytes."""
        wanted = demand(config)
        if not self.compares(config):
            return plan([wanted], self.nodes)
        if not config.run.num_gpus:
            return plan([replace(wanted, memory_bytes=need)], self.nodes)
        placed, share = plan([wanted], self.nodes), min(1.0, config.run.num_gpus)
        has = int((self.gpu_bytes or 0) * share)
        if need <= has or not placed.fits:
            return placed
        return Plan(
            placed.placed,
            f"wanted: {wanted} with {need / GIB:.1f} GiB of GPU memory; a rank has "
            f"{has / GIB:.1f} GiB of it",
        )


def smallest_gpu(summary: list[dict[str, Any]]) -> int | None:
    """Return the bytes of the smallest GPU that nodes tell of, as Ray's agents report them."""
    told = [gpu.get("memoryTotal") for node in summary for gpu in node.get("gpus") or ()]
    return min((int(mib) * MIB for mib in told if mib), default=None)
