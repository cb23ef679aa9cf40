"""How a step loop sees the world it runs in, and the plain-process implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from train_jobs.runs import RunDir


class World(Protocol):
    """One rank's view. The process group exists before the loop starts and outlives it."""

    @property
    def rank(self) -> int:
        """Number of this process, 0 to ``size - 1``."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Tell everybody who follows the run; only rank 0's words are kept. Never waits."""

    def saved(self, checkpoint: Path, metrics: Mapping[str, Any]) -> None:
        """Announce a complete checkpoint. Every rank calls it, equally often; may wait."""

    def should_stop(self) -> bool:
        """Return whether somebody asked for an early end; rank 0's answer counts."""


@dataclass(frozen=True)
class PlainWorld:
    """Processes that share a folder: ``--local N``, tests, notebooks."""

    rank: int
    size: int
    run: RunDir

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Append to ``metrics.jsonl``."""
        if self.rank == 0:
            self.run.append(metrics)

    def saved(self, checkpoint: Path, metrics: Mapping[str, Any]) -> None:
        """Append an event."""
        self.report({"event": "checkpoint", "path": str(checkpoint), **metrics})

    def should_stop(self) -> bool:
        """Look for the stop file."""
        return self.rank == 0 and self.run.stop.exists()


@dataclass(frozen=True)
class RayWorld(PlainWorld):
    """Workers of Ray Train. They write the same files; Ray hears of checkpoints only.

    ``ray.train.report`` is a barrier that waits for the controller's next poll, so it has no
    place in a step.
    """

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Append to ``metrics.jsonl``, and show it in Prometheus."""
        super().report(metrics)
        if self.rank == 0:
            from train_jobs.telemetry import telemetry

            telemetry(self.run).report(metrics)

    def saved(self, checkpoint: Path, metrics: Mapping[str, Any]) -> None:
        """Append an event and report the step to Ray Train."""
        import ray.train

        super().saved(checkpoint, metrics)
        ray.train.report({"checkpoint": str(checkpoint), **metrics})


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the element-wise sum of ``values`` over all ranks, in float64."""
    import torch
    import torch.distributed as dist

    told = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        told = told.cuda()
    dist.all_reduce(told)
    summed: list[float] = told.tolist()
    return summed
